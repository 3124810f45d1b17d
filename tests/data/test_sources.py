"""Reading rows: every format, compression and kind of URI, every row refused and every file that is wrong."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmkit.data.sources import Rejected, Row, Where, read_file, read_rows, source_digest
from llmkit.data.storage import DataFile
from llmkit.errors import DataError, RecipeError

TWO = [{"text": "one é", "n": 1}, {"text": "two", "n": 2}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def put(path: Path, content: bytes | str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def values(uri: str) -> list[dict[str, Any]]:
    rows = list(read_rows(uri))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.values for row in rows if isinstance(row, Row)]


def refused(uri: str) -> list[tuple[int, str]]:
    return [(row.where.line, row.reason) for row in read_rows(uri) if isinstance(row, Rejected)]


def error_of(uri: str) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(uri))
    assert caught.value.where is not None
    return caught.value


def test_where_is_a_file_and_a_line(tmp_path: Path) -> None:
    uri = put(tmp_path / "rows.jsonl", b"\n" + LINES)
    assert [str(row.where) for row in read_rows(uri)] == [f"{uri}:2", f"{uri}:3"]
    assert Where("a", 2) == Where("a", 2)


def parquet(data: list[dict[str, Any]], rows: int | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(data).slice(0, rows), sink)
    return bytes(sink.getvalue())


def arrow(rows: list[dict[str, Any]], new: Callable[..., Any]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return bytes(sink.getvalue())


FORMATS: dict[str, bytes] = {
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "array.json": json.dumps(TWO, indent=1).encode(),
    "object.json": json.dumps({"version": {"a": [1]}, "data": TWO, "n": 2}).encode(),
    "lines.json": LINES,
    "a.parquet": parquet(TWO),
    "stream.arrow": arrow(TWO, pa.ipc.new_stream),
    "file.arrow": arrow(TWO, pa.ipc.new_file),
}


@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_and_compression_gives_the_same_rows(tmp_path: Path, name: str, packed: str) -> None:
    content = PACK[packed](FORMATS[name]) if packed else FORMATS[name]
    assert values(put(tmp_path / (name + packed), content)) == TWO


@pytest.mark.parametrize("packed", ["", *PACK])
@pytest.mark.parametrize(("suffix", "comma"), [(".csv", ","), (".tsv", "\t")])
def test_csv_and_tsv(tmp_path: Path, suffix: str, comma: str, packed: str) -> None:
    content = f'text{comma}n\r\n"a{comma} ""b""\n c"{comma}1\r\n\r\nd{comma}\r\n'.encode()
    uri = put(tmp_path / ("a" + suffix + packed), PACK[packed](content) if packed else content)
    assert values(uri) == [{"text": f'a{comma} "b"\n c', "n": "1"}, {"text": "d", "n": ""}]
    assert [row.where.line for row in read_rows(uri)] == [2, 5]


def test_long_csv_fields_are_read(tmp_path: Path) -> None:
    assert len(values(put(tmp_path / "a.csv", "text,n\n" + "x" * 300_000 + ",1\n"))[0]["text"]) == 300_000


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    content = b"\xef\xbb\xbfone\n\ntwo\n"
    uri = put(tmp_path / f"a{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    assert list(read_rows(uri)) == [Row({"text": "one\n\ntwo\n"}, Where(uri, 1))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_accepted(tmp_path: Path, name: str) -> None:
    content = {"a.jsonl": b'{"a": "1"}\n', "a.json": b'[{"a": "1"}]', "a.csv": b"a\n1\n"}[name]
    assert values(put(tmp_path / name, b"\xef\xbb\xbf" + content)) == [{"a": "1"}]


def test_json_items_know_their_lines(tmp_path: Path) -> None:
    uri = put(tmp_path / "a.json", '{"v": 1,\n"rows": [\n{"a": "x\\n"},\n\n{"a":\n 2}, {"a": 3}]}')
    assert [row.where.line for row in read_rows(uri)] == [3, 5, 6]


def test_one_row_in_a_json_file_is_not_taken_for_a_list_of_messages(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert values(put(tmp_path / "a.json", json.dumps(row))) == [row]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "\xff"}', "not valid UTF-8: byte 0xff at offset 7 of the line"),
        (b'{"a": 1', "invalid JSON: Expecting ',' delimiter at column 8"),
        (b"nonsense", "invalid JSON: Expecting value at column 1"),
        (b"[1, 2]", "the row is a list, not an object"),
        (b'"a"', "the row is text, not an object"),
        (b"null", "the row is null, not an object"),
        (b'{"a": NaN}', "invalid JSON: NaN is not a JSON value"),
        (b'{"a": -Infinity}', "invalid JSON: -Infinity is not a JSON value"),
        (b'{"a": 1e999}', "invalid JSON: the number 1e999 is too large"),
        (b"[" * 100_000, "invalid JSON: nested too deeply"),
        (b'{"a": 1} {"a": 2}', "invalid JSON: Extra data at column 10"),
    ],
)
def test_a_bad_json_line_is_refused_and_the_rest_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    uri = put(tmp_path / "a.jsonl", b'{"a": 0}\n\n' + line + b'\n  \n{"a": 9}')
    rows = list(read_rows(uri))
    assert rows[1] == Rejected(reason, Where(uri, 3))
    assert [row.values for row in (rows[0], rows[2]) if isinstance(row, Row)] == [{"a": 0}, {"a": 9}]
    assert len(rows) == 3


def test_bad_items_of_a_json_array_are_refused(tmp_path: Path) -> None:
    uri = put(tmp_path / "a.json", '[{"a": 1},\n{"a": NaN},\n7,\n{"a": 2}]')
    assert refused(uri) == [(2, "invalid JSON: NaN is not a JSON value"), (3, "the row is a number, not an object")]
    assert [row.values for row in read_rows(uri) if isinstance(row, Row)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1", "the row has 1 fields, the header has 2"),
        (b"1,2,3", "the row has 3 fields, the header has 2"),
        (b"1,\xe9x", "not valid UTF-8: byte 0xe9 at offset 2 of the line"),
        (b"1,a\0b", "the row has a NUL byte"),
        (b'1,"a"b', "invalid CSV: ',' expected after '\"'"),
    ],
)
def test_a_bad_csv_row_is_refused_and_the_rest_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    uri = put(tmp_path / "a.csv", b'a,b\n"x\ny",0\n' + line + b"\n8,9\n")
    assert refused(uri) == [(4, reason)]
    assert [row.values["b"] for row in read_rows(uri) if isinstance(row, Row)] == ["0", "9"]


def test_an_unclosed_quote_is_refused_with_every_line_that_it_swallows(tmp_path: Path) -> None:
    assert refused(put(tmp_path / "a.csv", 'a,b\n1,2\n"3,4\n5,6\n')) == [
        (3, "invalid CSV: unexpected end of data"),
        (4, "the line goes on with a record that is refused"),
    ]


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    assert refused(put(tmp_path / "a.txt", b"ok\n\xff")) == [(2, "not valid UTF-8: byte 0xff at offset 3 of the file")]


def test_parquet_text_that_is_not_utf8_is_refused_row_by_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([b"a", b"\xff", b"c"]).view(pa.string())}), tmp_path / "a.parquet")
    uri = str(tmp_path / "a.parquet")
    assert refused(uri) == [(2, "not valid UTF-8: byte 0xff at offset 0")]
    assert [row.where.line for row in read_rows(uri) if isinstance(row, Row)] == [1, 3]


def test_a_part_of_a_file_knows_its_lines_and_what_is_not_its_start() -> None:
    part = io.BytesIO(b"\xff\xfe{}\n{}\n")
    rows = list(read_file(DataFile("a.jsonl", "a.jsonl"), part, lines_before=7))
    assert [(type(row), row.where.line) for row in rows] == [(Rejected, 8), (Row, 9)]


def test_a_big_jsonl_file_is_read_as_a_stream(tmp_path: Path) -> None:
    rows = read_rows(put(tmp_path / "a.jsonl.gz", gzip.compress(LINES * 50_000)[:-2000]))
    assert isinstance(next(rows), Row)
    with pytest.raises(DataError):
        list(rows)


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["cut", "corrupt", "not packed"])
def test_a_damaged_compressed_file_is_an_error(tmp_path: Path, suffix: str, damage: str) -> None:
    noise = b"".join(b'{"text": "%s"}\n' % os.urandom(8).hex().encode() for _ in range(2000))
    whole = bytearray(PACK[suffix](noise))
    if damage == "corrupt":
        whole[len(whole) // 2 : len(whole) // 2 + 8] = bytes(255 - byte for byte in whole[len(whole) // 2 :][:8])
    uri = put(tmp_path / f"a.jsonl{suffix}", {"cut": bytes(whole[:-20]), "not packed": LINES}.get(damage, bytes(whole)))
    error = error_of(uri)
    assert "cut short or corrupt" in error.what
    assert error.where == uri
    assert error.hint
    assert error.got


@pytest.mark.parametrize("frames", [1, 3])
def test_zstd_frames_follow_each_other(tmp_path: Path, frames: int) -> None:
    assert len(values(put(tmp_path / "a.jsonl.zst", PACK[".zst"](LINES) * frames))) == 2 * frames


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("damage", ["cut", "nonsense"])
def test_a_damaged_columnar_file_is_an_error(tmp_path: Path, name: str, damage: str) -> None:
    content = FORMATS[name][: len(FORMATS[name]) // 2] if damage == "cut" else b"nonsense" * 50
    error = error_of(put(tmp_path / name, content))
    assert error.what in ("a damaged Parquet file", "a damaged Arrow file")
    assert error.where == str(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "got", "line"),
    [
        (b'[{"a": 1},\n {"a": ]', "Expecting value at line 2, column 8", 2),
        (b'[{"a": 1}]\nx', "Extra data at line 2, column 1", 2),
        (b'\n[{"a": "\xff"}]', "not valid UTF-8: byte 0xff at offset 9 of the file", 2),
        (b"7", "a number", 1),
        (b'{"a": [{}], "b": [{}]}', "an object with the arrays `a`, `b`", 1),
    ],
)
def test_a_json_file_that_is_no_list_of_rows_is_an_error(tmp_path: Path, content: bytes, got: str, line: int) -> None:
    error = error_of(put(tmp_path / "a.json", content))
    assert (error.got, error.where) == (got, f"{tmp_path}/a.json:{line}")


@pytest.mark.parametrize(("header", "got"), [(b"a,a", "two columns are called `a`"), (b"a,\xff", "not valid UTF-8")])
def test_a_wrong_csv_header_is_an_error(tmp_path: Path, header: bytes, got: str) -> None:
    error = error_of(put(tmp_path / "a.csv", header + b"\n1,2\n"))
    assert got in str(error.got)
    assert error.where == f"{tmp_path}/a.csv:1"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt"])
def test_utf16_is_named(tmp_path: Path, name: str) -> None:
    error = error_of(put(tmp_path / name, "a,b\n1,2\n".encode("utf-16")))
    assert "UTF-16" in error.what
    assert error.hint


@pytest.mark.parametrize(
    ("name", "content"),
    [(f"a{suffix}", b"") for suffix in (".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow", ".jsonl.zst")]
    + [("a.jsonl", b"\n \n"), ("a.csv", b"a,b\n"), ("a.json", b"[]"), ("b.parquet", parquet([{"a": 1}], rows=0))],
)
def test_no_rows_at_all_is_an_error(tmp_path: Path, name: str, content: bytes) -> None:
    assert error_of(put(tmp_path / name, content)).what == "the data has no rows"


def test_one_empty_file_among_others_is_counted(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", LINES)
    put(tmp_path / "b.jsonl", "")
    assert refused(f"{tmp_path}/*.jsonl") == [(1, "the file has no rows")]


def test_a_missing_file_is_an_error_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    put(tmp_path / "train_rows.jsonl", LINES)
    with pytest.raises(DataError) as caught:
        read_rows(f"{tmp_path}/train_row.jsonl")
    assert caught.value.hint == "did you mean `train_rows.jsonl`?"
    assert caught.value.got == f"{tmp_path}/train_row.jsonl"


@pytest.mark.parametrize("uri", ["rows", "no/rows.jsonl", "./no/rows", "~/no-such-rows-here", "here/train"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert error_of(uri).what == "the data is missing"


def test_globs_are_sorted_and_skip_hidden_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "inner/c.jsonl", ".hidden.jsonl"):
        put(tmp_path / name, json.dumps({"from": name}))
    assert [row["from"] for row in values(f"{tmp_path}/*.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [row["from"] for row in values(f"{tmp_path}/**/*.jsonl")] == ["a.jsonl", "b.jsonl", "inner/c.jsonl"]
    assert error_of(f"{tmp_path}/*.csv").what == "a glob matches nothing"
    assert next(read_rows(f"{tmp_path}/[b]*")).where.source == f"{tmp_path}/b.jsonl"


def test_a_file_name_may_look_like_a_glob(tmp_path: Path) -> None:
    assert values(put(tmp_path / "a[1].jsonl", LINES)) == TWO


def test_a_relative_path_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "d" / "a.jsonl", LINES)
    assert {next(read_rows(uri)).where.source for uri in ("d/a.jsonl", "d/*.jsonl", "d")} == {"d/a.jsonl"}


def test_a_folder_of_data_files(tmp_path: Path) -> None:
    for name in ("2.jsonl", "1.ndjson", "README.md", "script.py", "_part.jsonl"):
        put(tmp_path / name, json.dumps({"from": name}))
    assert [row["from"] for row in values(str(tmp_path))] == ["1.ndjson", "2.jsonl"]
    put(tmp_path / "3.csv", "a\n1\n")
    assert error_of(str(tmp_path)).what == "a folder mixes formats"


def test_a_folder_without_data_files_is_an_error(tmp_path: Path) -> None:
    put(tmp_path / "script.py", "")
    error = error_of(str(tmp_path))
    assert (error.what, error.got) == ("a folder has no data files", "script.py")


@pytest.mark.parametrize("name", ["a.jsnl", "a.xlsx", "a", "a.gz", "a.pkl.gz"])
def test_an_unknown_suffix_is_an_error_that_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    error = error_of(put(tmp_path / name, LINES))
    assert error.what == "a data file has an unknown suffix"
    assert ".jsonl" in str(error.expected)
    assert ".zst" in str(error.expected)
    assert (error.hint == "did you mean `.jsonl`?") == (name == "a.jsnl")


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder, and a process that is not root while the test runs (root may read everything)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        read_all = list(read_rows(put(folder / "warm.jsonl", LINES)))  # imports what reading needs
        assert len(read_all) == 2
        put(folder / "secret.jsonl", LINES)
        put(folder / "closed" / "a.jsonl", LINES)
        (folder / "secret.jsonl").chmod(0)
        (folder / "closed").chmod(0)
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if was_root:
                os.seteuid(0)
            (folder / "closed").chmod(0o755)


@pytest.mark.parametrize("name", ["secret.jsonl", "closed/a.jsonl", "closed"])
def test_no_permission_is_said(unprivileged: Path, name: str) -> None:
    assert error_of(str(unprivileged / name)).what == "no permission to read the data"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        put(tmp_path / "fancy_data" / "rows" / name, json.dumps({"from": name}))
    put(tmp_path / "fancy_data" / "__init__.py", "raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("package")
def test_files_of_a_package() -> None:
    assert values("pkg://fancy_data/rows/b.jsonl") == [{"from": "b.jsonl"}]
    assert [str(row.where) for row in read_rows("pkg://fancy_data/rows/*.jsonl")] == [
        "pkg://fancy_data/rows/a.jsonl:1",
        "pkg://fancy_data/rows/b.jsonl:1",
    ]
    assert len(values("pkg://fancy_data/rows")) == 2


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    "uri", ["pkg://fancy_data/no.jsonl", "pkg://no_such_package_x/a.jsonl", "pkg://fancy_data/*/../../../*.jsonl"]
)
def test_what_a_package_does_not_have_is_an_error(uri: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(uri)
    assert caught.value.got == uri


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe({"/d/b.jsonl": LINES, "/d/a.jsonl.zst": PACK[".zst"](LINES), "/p/a.parquet": FORMATS["a.parquet"]})
    yield filesystem
    filesystem.rm("/d", recursive=True)
    filesystem.rm("/p", recursive=True)


@pytest.mark.usefixtures("memory")
def test_fsspec_urls() -> None:
    assert values("memory://d/b.jsonl") == TWO
    assert values("memory://p/a.parquet") == TWO
    for uri, folder in (("memory://d/*", "memory:///d"), ("memory://d", "memory://d")):
        names = [row.where.source for row in read_rows(uri)]
        assert names[::2] == [f"{folder}/a.jsonl.zst", f"{folder}/b.jsonl"]
    assert error_of("memory://d/c.jsonl").what == "the data is missing"
    assert error_of("memory://d/*.csv").what == "a glob matches nothing"


def test_a_url_of_an_unknown_kind_is_an_error_without_its_password() -> None:
    error = error_of("nonsense://me:secret@host/a.jsonl")
    assert error.what == "the data cannot be reached"
    assert "secret" not in f"{error.got} {error.where} {error.hint}"


def test_a_saved_data_set_is_read_with_the_names_of_its_classes(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    saved = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features)
    saved.save_to_disk(str(tmp_path / "one"))
    expected = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}, {"text": "c", "label": None}]
    assert values(str(tmp_path / "one")) == expected
    assert [str(row.where) for row in read_rows(str(tmp_path / "one"))][2] == f"{tmp_path}/one:3"
    datasets.DatasetDict({"test": saved.select([2]), "train": saved}).save_to_disk(str(tmp_path / "two"))
    assert values(str(tmp_path / "two")) == expected
    assert values(str(tmp_path / "two" / "test")) == expected[2:]
    assert source_digest(str(tmp_path / "one")) == source_digest(str(tmp_path / "two"))
    assert source_digest(str(tmp_path / "two" / "test")) != source_digest(str(tmp_path / "two"))


def test_saved_data_sets_that_are_wrong(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"test": one}).save_to_disk(str(tmp_path / "test-only"))
    error = error_of(str(tmp_path / "test-only"))
    assert (error.got, error.hint) == ("test", f"name one: {tmp_path}/test-only/test")
    one.select([]).save_to_disk(str(tmp_path / "empty"))
    assert error_of(str(tmp_path / "empty")).what == "a saved data set cannot be read"
    put(tmp_path / "damaged" / "state.json", "{")
    assert error_of(str(tmp_path / "damaged")).what == "a saved data set cannot be read"


def test_a_hub_id_with_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(name: str, **options: Any) -> datasets.Dataset:
        asked.append((name, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [str(row.where) for row in read_rows("owner/some-name")] == ["owner/some-name:train:1"]
    assert values("owner/some-name:test") == [{"text": "a"}]
    assert asked == [("owner/some-name", {"split": "train"}), ("owner/some-name", {"split": "test"})]
    assert source_digest("owner/some-name") == source_digest("owner/some-name")
    assert source_digest("owner/some-name") != source_digest("owner/some-name:test")


def test_a_hub_failure_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = error_of("owner/name")
    assert "owner/name" in error.what
    assert error.got == "ConnectionError: no network"


def test_a_hub_data_set_without_rows_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": []}))
    assert error_of("owner/name").what == "the data has no rows"


def test_an_unknown_builtin_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        read_rows("builtin:docstring")
    assert caught.value.hint == "did you mean `docstrings`?"


def test_the_digest_is_of_the_bytes_alone(tmp_path: Path) -> None:
    first = put(tmp_path / "a.jsonl", LINES)
    digest = source_digest(first)
    second = put(tmp_path / "x" / "b.jsonl", LINES)
    os.utime(second, (1, 1))
    assert source_digest(second) == digest
    put(tmp_path / "x" / "b.jsonl", LINES + b"\n")
    assert source_digest(second) != digest
    assert source_digest(f"{tmp_path}/**/*.jsonl") != digest
    with pytest.raises(DataError):
        source_digest(f"{tmp_path}/no.jsonl")
