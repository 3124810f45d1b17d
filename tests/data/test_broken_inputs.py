"""A zoo of broken rows: each ends in a named refusal or a clear error, and the good rows are kept."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from tests.data.zoo import MANY, NO_ROWS, ONE, THREE, TWO, Case, chat, check, line, no_hang, parquet  # noqa: F401

UTF16 = "a data file is UTF-16"

GOOD_CHAT = chat(("user", "hi"), ("assistant", "yes"))


LINES = [
    Case(
        "bad json in line 7",
        ONE * 6 + b'{"text": 7\n' + TWO,
        good=7,
        refused={"7": "invalid JSON: Expecting"},
    ),
    Case("a NUL byte in a line", ONE + b'{"text": "a\0b"}\n' + TWO, good=2, refused={"2": "Invalid control character"}),
    Case("a hole of NUL bytes", ONE + bytes(4096) + b"\n" + TWO, good=2, refused={"2": "Expecting value at column 1"}),
    Case(
        "a lone surrogate",
        ONE + b'{"text": "a\\ud800"}\n' + TWO,
        good=2,
        refused={"2": "text has a lone surrogate at character 2"},
    ),
    Case("a mark in the middle", b"\xef\xbb\xbf" + ONE + b"\xef\xbb\xbf" + TWO, good=2),
    Case("utf-16 le", ONE.decode().encode("utf-16"), error=UTF16, at="a.jsonl:1"),
    Case("utf-16 be", b"\xfe\xff" + ONE.decode().encode("utf-16-be"), error=UTF16, at="a.jsonl:1"),
    Case("utf-16 le without a mark", ONE.decode().encode("utf-16-le"), error=UTF16, at="a.jsonl:1"),
    Case("utf-16 be without a mark", ONE.decode().encode("utf-16-be"), error=UTF16, at="a.jsonl:1"),
    Case(
        "latin-1",
        ONE + '{"text": "é"}\n'.encode("latin-1") + TWO,
        good=2,
        refused={"2": "not valid UTF-8: byte 0xe9 at offset 10"},
    ),
    Case("empty", b"", error=NO_ROWS),
    Case("blank lines", b"\n \n\t\n\r\n", error=NO_ROWS),
    Case(
        "mixed schemas", ONE + line(prompt="a", completion="b") + TWO, good=2, refused={"2": "column `text` is missing"}
    ),
    Case("cut in a character", ONE + '{"text": "é"}'.encode()[:-3], good=1, refused={"2": "not valid UTF-8"}),
    Case("cut in a line", ONE + b'{"text": "tw', good=1, refused={"2": "Unterminated string"}),
    Case(
        "the line ends of an old Mac", ONE[:-1] + b"\r" + TWO[:-1] + b"\n" + THREE, good=1, refused={"1": "Extra data"}
    ),
    Case("two rows in a line", ONE + TWO[:-1] + THREE, good=1, refused={"2": "Extra data"}),
    Case("a Python dict", ONE + b"{'text': 'two'}\n", good=1, refused={"2": "Expecting property name"}),
    Case(
        "duplicate keys",
        ONE + b'{"text": "a", "text": "b"}\n',
        good=1,
        refused={"2": "the key `text` stands more than once"},
    ),
    Case(
        "a huge whole number",
        ONE + b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n",
        good=1,
        refused={"2": "a number has too many digits"},
    ),
    Case("a huge number", ONE + b'{"text": "a", "n": 1e999}\n', good=1, refused={"2": "the number 1e999 is too large"}),
    Case(
        "nested deeply",
        ONE + b'{"text": ' + b"[" * 200 + b"]" * 200 + b"}\n",
        good=1,
        refused={"2": "nested too deeply"},
    ),
    Case(
        "nested endlessly",
        ONE + b'{"text": ' + b"[" * 1_000_000 + b"\n" + TWO,
        good=2,
        refused={"2": "nested too deeply"},
    ),
    Case(
        "rows that are no objects",
        b"[1]\n" + ONE + b'"a"\n3\nnull\n',
        good=1,
        refused=dict.fromkeys("1345", "not an object"),
    ),
    Case("no row can be read", b"x\ny\n", refused={"1": "Expecting value", "2": "Expecting value"}),
    Case("a column whose name is a lone surrogate", b'{"\\ud800": "a"}\n', error="no row format fits", at="a.jsonl:1"),
]
NULLS = b"".join(
    (
        line(messages=None),
        line(messages=[None]),
        chat(("user", None), ("assistant", "a")),
        chat((None, "a"), ("assistant", "a")),
        line(messages=[{"role": None, "content": None}]),
        GOOD_CHAT,
    )
)
CHATS = [
    Case(
        "nested nulls",
        NULLS,
        good=1,
        kind="chat",
        refused={
            "1": "column `messages` is null",
            "2": "message 1 is null",
            "3": "message 1 has no `content`",
            "4": "message 1 has no `role`",
            "5": "message 1 has no `role`",
        },
    ),
    Case(
        "roles out of order",
        GOOD_CHAT + chat(("assistant", "a"), ("user", "b")),
        good=1,
        kind="chat",
        refused={"2": "no user turn before the first assistant turn"},
    ),
    Case(
        "two system turns",
        GOOD_CHAT + chat(("system", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")),
        good=1,
        kind="chat",
        refused={"2": "system turn is not the first"},
    ),
    Case(
        "a tool turn without a call",
        GOOD_CHAT + chat(("user", "a"), ("tool", "b"), ("assistant", "c")),
        good=1,
        kind="chat",
        refused={"2": "the tool turn 2 follows no call"},
    ),
    Case(
        "a role of the wrong kind",
        GOOD_CHAT + chat((["user"] * 9999, "a")) + chat(("\ud800\n", "a")),
        good=1,
        kind="chat",
        refused={"2": "unknown role `['user', ", "3": "unknown role `\\ud800\\n`"},
    ),
    Case(
        "extras nested deeply",
        GOOD_CHAT + chat(("user", "a"), ("assistant", "b"), tools=[eval("[" * 60 + "]" * 60)]),
        good=1,
        kind="chat",
        refused={"2": "tools is nested too deeply"},
    ),
]
LABELS = [
    Case(
        "labels of two types",
        b"".join(line(text="a", label=label) for label in (1, 2.0, "1", True, 3)),
        good=3,
        kind="labelled",
        refused={"3": "column `label` is text and most labels are a number", "4": "is true or false"},
    ),
    Case(
        "labels that are no number",
        line(text="a", label=1) + b'{"text": "a", "label": NaN}\n',
        good=1,
        kind="labelled",
        refused={"2": "NaN is not a JSON value"},
    ),
    Case(
        "labels that are fractions",
        line(text="a", label=1) + line(text="a", label=0.5),
        good=1,
        kind="labelled",
        refused={"2": "label 0.5 is not a whole number"},
    ),
    Case(
        "labels that are not there in Parquet",
        parquet(pa.table({"text": ["a"] * 3, "label": [1.0, float("nan"), None]})),
        "a.parquet",
        good=1,
        kind="labelled",
        refused={"2": "label nan is not a whole number", "3": "column `label` is null"},
    ),
]
TABLES = [
    Case(
        "an unclosed quote",
        b'text,n\none,1\n"two,2\nthree,3\nfour,4\n',
        "a.csv",
        good=1,
        refused={"3": "unexpected end of data", "4": "goes on with a record", "5": "goes on with a record"},
    ),
    Case("a quote that closes early", b'text,n\n"a"b,1\ntwo,2\n', "a.csv", good=1, refused={"2": "invalid CSV"}),
    Case(
        "a quote that closes in another line",
        b'text,n\n"a,1\n"b,2\ntwo,2\n',
        "a.csv",
        good=1,
        refused={"2": "invalid CSV", "3": "goes on with a record"},
    ),
    Case(
        "ragged",
        b"text,n\none\ntwo,2\nthree,3,3\n",
        "a.csv",
        good=1,
        refused={"2": "has 1 fields", "4": "has 3 fields"},
    ),
    Case(
        "a header with one name twice",
        b"text,text\na,b\n",
        "a.csv",
        error="the header of a CSV file is wrong",
        at="a.csv:1",
    ),
    Case("a header with a NUL", b"te\0xt\na\n", "a.csv", error="the header of a CSV file is wrong", at="a.csv:1"),
    Case("a NUL in a field", b"text\na\0b\ntwo\n", "a.csv", good=1, refused={"2": "the row has a NUL byte"}),
    Case("latin-1 in a field", b"text\n\xe9\ntwo\n", "a.csv", good=1, refused={"2": "byte 0xe9"}),
    Case("nothing but a header", b"text,n\n", "a.csv", error=NO_ROWS),
    Case("another separator", b"text;n\na;1\n", "a.csv", error="no row format fits", at="a.csv:2"),
    Case("a table in UTF-16", "text\na\n".encode("utf-16-le"), "a.csv", error=UTF16, at="a.csv:1"),
    Case(
        "the line ends of an old Mac in a table",
        b"text\rone\rtwo\r",
        "a.csv",
        error="the header of a CSV file",
        at="a.csv:1",
    ),
]
WHOLE = [
    Case("json that is a number", b"7", "a.json", error="a JSON file is not a list of rows", at="a.json:1"),
    Case("json cut short", b'[{"text": "a"},\n{"text": ', "a.json", error="a JSON file does not parse", at="a.json:2"),
    Case(
        "json with two arrays",
        b'{"a": [{}], "b": [{}]}',
        "a.json",
        error="a JSON file is not a list of rows",
        at="a.json:1",
    ),
    Case("json nested endlessly", b"[" * 1_000_000, "a.json", error="a JSON file does not parse"),
    Case("json rows nested endlessly", b'{"text": ' * 1_000_000, "a.json", error="a JSON file does not parse"),
    Case(
        "json with bad items",
        b'[{"text": "a"},\n{"n": ' + b"9" * 5000 + b'},\n{"n": NaN},\n3,\n{"n": 1, "n": 2},\n{"text": "b"}]',
        "a.json",
        good=2,
        refused={"2": "too many digits", "3": "NaN is not a JSON value", "4": "is a number", "5": "more than once"},
    ),
    Case("text that is latin-1", "ein\nWört".encode("latin-1"), "a.txt", refused={"2": "not valid UTF-8: byte 0xf6"}),
    Case("text with a NUL", b"one\ntwo\0", "a.md", refused={"2": "the text has a NUL byte"}),
    Case("text that is a picture", b"\x89PNG\r\n\x1a\n", "a.html", refused={"1": "not valid UTF-8"}),
    Case("text in UTF-16", "one".encode("utf-16"), "a.txt", error=UTF16, at="a.txt:1"),
]


@pytest.mark.parametrize("case", [*LINES, *CHATS, *LABELS, *TABLES, *WHOLE], ids=str)
def test_broken_rows(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)
