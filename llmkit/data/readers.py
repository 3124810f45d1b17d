"""Rows out of text files: JSON Lines, JSON, CSV and plain text, with the line of every row and of every row refused.

One bad row is a `Rejected`, so that the caller can count and name it; a file that is wrong as a whole is a DataError.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from llmkit.errors import DataError

_BOM = b"\xef\xbb\xbf"
_CSV_FIELD_CHARS = 1 << 24
_SEPARATORS = re.compile(r"[ \t\r\n,:]*")
_ROW_COLUMNS = frozenset({"messages", "conversations", "conversation", "dialog", "dialogue"})


@dataclass(frozen=True, slots=True)
class Where:
    """Where a row comes from: the file as a person calls it, and its line from 1 (or row, where there are no lines)."""

    source: str
    line: int

    def __str__(self) -> str:
        return f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it is stored, column by column."""

    values: dict[str, Any]
    where: Where


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out, and why."""

    reason: str
    where: Where


def type_name(value: Any) -> str:
    """What a value is, in the words of the messages: "a list", "text", "a number"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names: tuple[tuple[type | tuple[type, ...], str], ...] = (
        (str, "text"),
        ((int, float), "a number"),
        ((list, tuple), "a list"),
        (dict, "an object"),
        ((bytes, bytearray), "bytes"),
    )
    return next((name for types, name in names if isinstance(value, types)), type(value).__name__)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _strict_decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float)


def _not_utf8(error: UnicodeDecodeError, of: str) -> str:
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} of the {of}"


def _refuse_utf16(start: bytes, source: str) -> None:
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            "a data file is UTF-16",
            got=f"it starts with {start[:2].hex(' ')}",
            expected="UTF-8",
            hint="iconv -f UTF-16 -t UTF-8 OLD > NEW",
            where=f"{source}:1",
        )


def _row_or_rejected(value: Any, where: Where) -> Row | Rejected:
    if isinstance(value, dict):
        return Row(value, where)
    return Rejected(f"the row is {type_name(value)}, not an object", where)


def read_json_lines(file: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    """One row a line, one line in memory at a time; blank lines are skipped and a byte order mark is accepted."""
    decode = _strict_decoder().decode
    for number, raw in enumerate(file, 1):
        if number == 1:
            _refuse_utf16(raw, source)
            raw = raw.removeprefix(_BOM)
        if not raw.strip():
            continue
        where = Where(source, number)
        try:
            yield _row_or_rejected(decode(raw.rstrip().decode("utf-8")), where)
        except UnicodeDecodeError as error:
            yield Rejected(_not_utf8(error, "line"), where)
        except json.JSONDecodeError as error:
            yield Rejected(f"invalid JSON: {error.msg} at column {error.colno}", where)
        except RecursionError:
            yield Rejected("invalid JSON: nested too deeply", where)
        except ValueError as error:
            yield Rejected(f"invalid JSON: {error}", where)


def read_json(file: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    """The objects of an array, or of the one array in an object; JSON Lines under this suffix are read as such.

    The file is held in memory, since its shape is known only at its end; JSON Lines is the format for large data.
    Raises DataError, with line and column, when the file does not parse or is neither shape.
    """
    raw = file.read()
    _refuse_utf16(raw, source)
    raw = raw.removeprefix(_BOM)
    if not raw.strip():
        return
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _bad_json(_not_utf8(error, "file"), f"{source}:{line}") from None
    except RecursionError:
        raise _bad_json("nested too deeply", source) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _starts_with_object_line(text):
            yield from read_json_lines(io.BytesIO(raw), source)
            return
        got = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise _bad_json(got, f"{source}:{error.lineno}") from None
    except ValueError as error:
        raise _bad_json(str(error), source) from None
    start = text.index("[") if isinstance(value, list) else _array_of(value, text, source)
    if start is None:
        line = text.count("\n", 0, len(text) - len(text.lstrip())) + 1
        yield from (_numbered(row, line) for row in read_json_lines(io.BytesIO(json.dumps(value).encode()), source))
    else:
        yield from _array_items(text, start, source)


def _numbered(row: Row | Rejected, line: int) -> Row | Rejected:
    where = Where(row.where.source, line)
    return Row(row.values, where) if isinstance(row, Row) else Rejected(row.reason, where)


def _bad_json(got: str, where: str) -> DataError:
    hint = "name it .jsonl if each line is a row of its own"
    return DataError("a JSON file does not parse", got=got, expected="an array of objects", hint=hint, where=where)


def _starts_with_object_line(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().partition("\n")[0]), dict)
    except ValueError:
        return False


def _array_of(value: Any, text: str, source: str) -> int | None:
    """The index of the one array's bracket in a text known to be valid JSON; None when the object itself is a row."""
    arrays = [key for key, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
    if isinstance(value, dict) and (not arrays or _ROW_COLUMNS.intersection(arrays)):
        return None
    if len(arrays) != 1:
        got = type_name(value) + (" with the arrays " + ", ".join(f"`{key}`" for key in arrays) if arrays else "")
        expected = "an array of objects, or an object with one array"
        raise DataError("a JSON file is not a list of rows", got=got, expected=expected, where=f"{source}:1")
    decode = json.JSONDecoder().raw_decode
    position = _skip_separators(text, text.index("{") + 1)
    start = position
    while text[position] != "}":
        key, position = decode(text, position)
        position = _skip_separators(text, position)
        start = position if key == arrays[0] else start
        position = _skip_separators(text, decode(text, position)[1])
    return start


def _skip_separators(text: str, position: int) -> int:
    found = _SEPARATORS.match(text, position)
    return found.end() if found else position


def _array_items(text: str, start: int, source: str) -> Iterator[Row | Rejected]:
    """The items of the array at `start`, each with its line, in a text known to be valid JSON."""
    strict, lenient = _strict_decoder(), json.JSONDecoder()
    line, counted = 1, 0
    position = _skip_separators(text, start + 1)
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        where = Where(source, line)
        try:
            value, position = strict.raw_decode(text, position)
            yield _row_or_rejected(value, where)
        except ValueError as error:
            position = lenient.raw_decode(text, position)[1]
            yield Rejected(f"invalid JSON: {error}", where)
        position = _skip_separators(text, position)


def read_csv(file: BinaryIO, source: str, *, delimiter: str = ",") -> Iterator[Row | Rejected]:
    """One row a record, its columns named by the first; every value is text, and a row's line is where it starts."""
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_CHARS))  # bounds what an unclosed quote can swallow
    undecodable: list[str] = []
    reader = csv.reader(_csv_lines(file, source, undecodable), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where = Where(source, reader.line_num + 1)
        problem = None
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"invalid CSV: {error}"
        if undecodable:
            problem = undecodable[0]
            undecodable.clear()
        elif any("\0" in field for field in fields):
            problem = "the row has a NUL byte"
        elif header and fields and len(fields) != len(header):
            problem = f"the row has {len(fields)} fields, the header has {len(header)}"
        if not header:
            header = _csv_header(fields, problem, where)
        elif problem:
            yield Rejected(problem, where)
        elif fields:
            yield Row(dict(zip(header, fields, strict=True)), where)


def _csv_lines(file: BinaryIO, source: str, undecodable: list[str]) -> Iterable[str]:
    """Decoded lines; for one that is not UTF-8 the reason joins `undecodable` and the bytes become surrogates."""
    for number, raw in enumerate(file, 1):
        if number == 1:
            _refuse_utf16(raw, source)
            raw = raw.removeprefix(_BOM)
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            undecodable.append(_not_utf8(error, "line"))
            yield raw.decode("utf-8", errors="surrogateescape")


def _csv_header(fields: list[str], problem: str | None, where: Where) -> list[str]:
    repeated = next((name for name in fields if fields.count(name) > 1), None)
    if repeated is not None:
        problem = f"two columns are called `{repeated}`"
    if problem:
        expected = "a first line that names each column once"
        raise DataError("the header of a CSV file is wrong", got=problem, expected=expected, where=where)
    return fields


def read_text(file: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    """One document a file: a row `{"text": the whole text}` at line 1, as it is, without its byte order mark."""
    raw = file.read()
    _refuse_utf16(raw, source)
    raw = raw.removeprefix(_BOM)
    try:
        if raw.strip():
            yield Row({"text": raw.decode("utf-8")}, Where(source, 1))
    except UnicodeDecodeError as error:
        yield Rejected(_not_utf8(error, "file"), Where(source, raw.count(b"\n", 0, error.start) + 1))
