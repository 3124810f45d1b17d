"""What holds for any rows, any bytes and any conversation, tried on many that hypothesis makes up."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmkit.data.chat import ChatRenderer
from llmkit.data.columnar import read_parquet
from llmkit.data.delimited import read_csv
from llmkit.data.json_rows import read_json, read_json_lines
from llmkit.data.readers import Rejected, Row, Where, read_text
from llmkit.data.recognise import SHAPES
from llmkit.data.rows import RowFormat, choose_format, convert
from llmkit.data.sources import read_file
from llmkit.data.split import position
from llmkit.data.storage import DataFile
from llmkit.errors import DataError, LlmkitError
from tests.data.test_chat_masks import FAMILIES, Family
from tests.data.zoo import tar, zipped

SAME = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
OFTEN = settings(max_examples=100, **SAME)  # type: ignore[arg-type]
SELDOM = settings(max_examples=40, **SAME)  # type: ignore[arg-type]

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
ROWS = st.lists(st.dictionaries(TEXT, VALUES, max_size=4), max_size=6)


def rows_of(reader: Callable[[Any, str], Iterator[Row | Rejected]], content: bytes) -> list[tuple[int, Any]]:
    return [
        (row.where.line, row.values if isinstance(row, Row) else row.reason) for row in reader(io.BytesIO(content), "a")
    ]


def prove_clear(error: LlmkitError) -> None:
    assert error.where
    assert str(vars(error)).encode()


@OFTEN
@given(ROWS, st.booleans(), st.booleans(), st.booleans())
def test_json_lines_come_back(rows: list[dict[str, Any]], escaped: bool, marked: bool, blank: bool) -> None:
    gap = "\n \n" if blank else "\n"
    text = gap.join(json.dumps(row, ensure_ascii=escaped) for row in rows)
    content = (b"\xef\xbb\xbf" if marked else b"") + text.encode()
    assert rows_of(read_json_lines, content) == [(at * (2 if blank else 1) + 1, row) for at, row in enumerate(rows)]


@OFTEN
@given(ROWS, st.booleans(), st.sampled_from([None, 1]))
def test_json_arrays_come_back(rows: list[dict[str, Any]], wrapped: bool, indent: int | None) -> None:
    content = json.dumps({"version": 1, "data": rows} if wrapped else rows, indent=indent).encode()
    assert [values for _, values in rows_of(read_json, content)] == rows


FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@OFTEN
@given(st.lists(st.tuples(FIELDS, FIELDS), max_size=6), st.sampled_from([",", "\t"]))
def test_csv_comes_back_with_its_lines(records: list[tuple[str, str]], delimiter: str) -> None:
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    expected = []
    for record in [("a", "b"), *records]:
        expected.append((sink.getvalue().count("\n") + 1, dict(zip("ab", record, strict=True))))
        writer.writerow(record)
    found = rows_of(lambda file, source: read_csv(file, source, delimiter=delimiter), sink.getvalue().encode())
    assert found == expected[1:]


@SELDOM
@given(
    st.lists(
        st.fixed_dictionaries(
            {"text": st.none() | TEXT, "n": st.integers(-(2**63), 2**63 - 1), "more": st.lists(TEXT)}
        ),
        min_size=1,
        max_size=6,
    )
)
def test_parquet_comes_back(rows: list[dict[str, Any]]) -> None:
    schema = pa.schema({"text": pa.string(), "n": pa.int64(), "more": pa.list_(pa.string())})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    assert rows_of(read_parquet, sink.getvalue()) == list(enumerate(rows, 1))


WHOLE = [b"\xef\xbb\xbf", b"\xff\xfe", b"NaN", b"1e999", b"9" * 5000, b'{"a": 1}', b'"a": ', b'"\\ud800"', b"\xc3\xa9"]
PIECES = st.sampled_from(
    [*WHOLE, b"[" * 2000, b'{"a":' * 500, b"a,a\n", b"a,b\n", *(b"%c" % each for each in b'\n\r\0",{}[]:\\ \xff')]
)
ANY_BYTES = st.binary(max_size=40) | st.lists(PIECES | st.binary(max_size=3), max_size=12).map(b"".join)


@pytest.mark.parametrize(
    "reader", [read_json_lines, read_json, read_csv, read_text], ids=lambda reader: reader.__name__
)
@OFTEN
@given(content=ANY_BYTES)
def test_any_bytes_are_read_or_refused(reader: Callable[[Any, str], Iterator[Row | Rejected]], content: bytes) -> None:
    lines = content.count(b"\n") + 1
    try:
        for row in reader(io.BytesIO(content), "a"):
            assert 1 <= row.where.line <= lines
            assert not isinstance(row, Rejected) or row.reason.isprintable()
    except DataError as error:
        prove_clear(error)


@pytest.mark.parametrize("pack", [tar, zipped])
@SELDOM
@given(at=st.integers(0, 4000), junk=st.binary(min_size=1, max_size=4), cut=st.booleans())
def test_a_damaged_archive_is_read_or_refused(
    pack: Callable[..., bytes], at: int, junk: bytes, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = pack(("a.jsonl", b'{"a": 1}\n'), ("b.jsonl", b'{"a": 2}\n' * 50))
    at %= len(whole)
    path = tmp_path_factory.getbasetemp() / f"a{'.tar' if pack is tar else '.zip'}"
    path.write_bytes(whole[:at] if cut else whole[:at] + junk + whole[at + len(junk) :])
    try:
        for row in read_file(DataFile(str(path), path.name)):
            (str(row.where) + str(row)).encode()
    except DataError as error:
        prove_clear(error)


ODD = st.binary(max_size=3) | st.datetimes() | st.floats() | st.decimals() | st.text(max_size=5) | st.just(datetime.min)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "\ud800"])
TURNS = st.fixed_dictionaries(
    {}, optional={"role": ROLES | VALUES, "content": TEXT | VALUES | ODD, "from": ROLES | VALUES, "value": TEXT | ODD,
                  "train": st.booleans() | st.none(), "tool_calls": VALUES | ODD, "more": VALUES | ODD}
)  # fmt: skip
COLUMNS = st.sampled_from(sorted({column for shape in SHAPES.values() for column in shape.columns}))
ANY_ROW = st.dictionaries(COLUMNS | TEXT, VALUES | ODD | st.lists(TURNS, max_size=4), max_size=6)


@OFTEN
@given(ANY_ROW, st.sampled_from(sorted(SHAPES)))
def test_any_row_becomes_a_canonical_row_or_is_refused(values: dict[str, Any], name: str) -> None:
    fmt = RowFormat(name, {column: column for column in SHAPES[name].columns}, None)
    converted = convert(Row(values, Where("a", 1)), fmt)
    if isinstance(converted, Rejected):
        assert converted.reason.isprintable()
        assert len(converted.reason) < 300
        return
    written = json.dumps(converted, ensure_ascii=False).encode()
    assert all(isinstance(converted.get(column, ""), str) for column in ("text", "label"))
    assert any(turn["role"] == "assistant" for turn in converted.get("messages", [{"role": "assistant"}]))
    assert 0 <= position(converted) < 1
    again = json.loads(written)
    assert again == converted or any(math.isnan(number) for number in floats_in(converted))


def floats_in(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from floats_in(inner)


@OFTEN
@given(st.lists(ANY_ROW, max_size=4), st.sampled_from(["text", "chat", "labelled"]))
def test_a_format_is_chosen_or_refused(values: list[dict[str, Any]], kind: str) -> None:
    sample = [Row(each, Where("a", at)) for at, each in enumerate(values, 1)]
    try:
        fmt = choose_format(sample, kind, name=None, columns=None, where="data.train")
    except LlmkitError as error:
        prove_clear(error)
        return
    for row in sample:
        convert(row, fmt)


SAID = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
MARKS = st.sampled_from(
    ["<|im_end", "assistant\n", "<|im_start|", "\n\n", "{{ x }}", "{% generation %}", " </s", "🎉", "[/INST"]
)
CONTENT = st.lists(SAID | MARKS, min_size=1, max_size=3).map("".join).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(CONTENT)})
        messages.append({"role": "assistant", "content": draw(CONTENT)})
        if draw(st.booleans()):
            messages[-1]["train"] = draw(st.booleans())
    return messages + ([{"role": "user", "content": draw(CONTENT)}] if draw(st.booleans()) else [])


@pytest.mark.parametrize("name", ["chatml", "llama 3", "phi 3", "qwen 3", "zephyr", "marks", "marks without the end"])
@SELDOM
@given(messages=conversations())
def test_exactly_the_answers_are_supervised_or_the_conversation_is_refused(
    name: str, messages: list[dict[str, Any]]
) -> None:
    family: Family = next(family for family in FAMILIES if family.name == name)
    try:
        rendered = ChatRenderer(family.tokenizer(), family.template).render({"messages": messages})
    except ValueError:
        return
    learnt = [m["content"] for m in messages if m["role"] == "assistant" and m.get("train", True)]
    found = [each.text[start:end] for each in rendered for start, end in each.spans]
    assert found == [family.answer(content) for content in learnt]
