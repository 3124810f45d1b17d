"""Rows out of JSON Lines and JSON files, with the line of every row and of every row refused."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, BinaryIO

from llmkit.data.readers import (
    BOM,
    TOO_LONG,
    Rejected,
    Row,
    Where,
    not_utf8,
    numbered_lines,
    refuse_utf16,
    shown,
    type_name,
    whole,
)
from llmkit.errors import DataError

_LARGEST_JSON_BYTES = 1 << 30
_DEEPEST = 100
_TOO_DEEP = "invalid JSON: nested too deeply"
_SEPARATORS = re.compile(r"[ \t\r\n,:]*")
_ROW_COLUMNS = frozenset({"messages", "conversations", "conversation", "dialog", "dialogue"})


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON value")


def _finite_float(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key `{shown(repeated)}` stands more than once in an object")
    return row


def _strict_decoder() -> json.JSONDecoder:
    return json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite_float, object_pairs_hook=_object)


def _lenient_decoder() -> json.JSONDecoder:
    """Finds where values end, also those with numbers that Python would not make."""
    return json.JSONDecoder(parse_int=len)


def _row_or_rejected(value: Any, where: Where, brackets: int) -> Row | Rejected:
    if not isinstance(value, dict):
        return Rejected(f"the row is {type_name(value)}, not an object", where)
    if brackets > _DEEPEST and _is_too_deep(value):
        return Rejected(_TOO_DEEP, where)
    return Row(value, where)


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        inner = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list))
        level = list(chain.from_iterable(inner))
        if not level:
            return False
    return True


def _json_row(text: str, where: Where, decode: Callable[[str], Any]) -> Row | Rejected:
    try:
        return _row_or_rejected(decode(text), where, text.count("[") + text.count("{"))
    except (ValueError, RecursionError) as error:
        return Rejected(_why_invalid(error), where)


def _why_invalid(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    if str(error).startswith("Exceeds the limit"):  # what int() says of thousands of digits
        return "invalid JSON: a number has too many digits"
    return f"invalid JSON: {error}"


def read_json_lines(file: BinaryIO, source: str, lines_before: int = 0) -> Iterator[Row | Rejected]:
    """One row a line, one line in memory at a time; blank lines are skipped, and so is a byte order mark before a line."""
    decode = _strict_decoder().decode
    for number, raw in numbered_lines(file, lines_before):
        where = Where(source, number)
        if raw is None:
            yield Rejected(f"the line is {TOO_LONG}", where)
            continue
        if number == 1:
            refuse_utf16(raw, source)
        stripped = raw.removeprefix(BOM).rstrip()
        if not stripped:
            continue
        try:
            text = stripped.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Rejected(not_utf8(error, "line"), where)
            continue
        yield _json_row(text, where, decode)


def read_json(file: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    """The objects of an array, or of the one array in an object; JSON Lines under this suffix are read as such.

    The file is held in memory, since its shape is known only at its end; JSON Lines is the format for large data.
    Raises DataError, with line and column, when the file does not parse or is neither shape.
    """
    raw = whole(file, _LARGEST_JSON_BYTES)
    if raw is None:
        raise _bad_json(f"more than {_LARGEST_JSON_BYTES >> 30} GiB, which is too much to parse at once", f"{source}:1")
    refuse_utf16(raw, source)
    raw = raw.removeprefix(BOM)
    if not raw.strip():
        return
    try:
        text = raw.decode("utf-8")
        value = _lenient_decoder().decode(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _bad_json(not_utf8(error, "file"), f"{source}:{line}") from None
    except RecursionError:
        raise _bad_json("nested too deeply", source) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and _starts_with_object_line(text):
            yield from read_json_lines(io.BytesIO(raw), source)
            return
        got = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise _bad_json(got, f"{source}:{error.lineno}") from None
    start = text.index("[") if isinstance(value, list) else _array_of(value, text, source)
    if start is None:
        line = text.count("\n", 0, len(text) - len(text.lstrip())) + 1
        yield _json_row(text, Where(source, line), _strict_decoder().decode)
    else:
        del value
        yield from _array_items(text, start, source)


def _bad_json(got: str, where: str) -> DataError:
    hint = "name it .jsonl if each line is a row of its own"
    return DataError("a JSON file does not parse", got=got, expected="an array of objects", hint=hint, where=where)


def _starts_with_object_line(text: str) -> bool:
    try:
        return isinstance(_lenient_decoder().decode(text.lstrip().partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _array_of(value: Any, text: str, source: str) -> int | None:
    """The index of the one array's bracket in a text known to be valid JSON; None when the object itself is a row."""
    arrays = [key for key, item in value.items() if isinstance(item, list)] if isinstance(value, dict) else []
    if isinstance(value, dict) and (not arrays or _ROW_COLUMNS.intersection(arrays)):
        return None
    if len(arrays) != 1:
        named = ", ".join(f"`{shown(key)}`" for key in arrays[:5]) + (", ..." if len(arrays) > 5 else "")
        got = type_name(value) + (f" with the arrays {named}" if arrays else "")
        expected = "an array of objects, or an object with one array"
        raise DataError("a JSON file is not a list of rows", got=got, expected=expected, where=f"{source}:1")
    decode = _lenient_decoder().raw_decode
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
    strict, lenient = _strict_decoder(), _lenient_decoder()
    line, counted = 1, 0
    position = _skip_separators(text, start + 1)
    while text[position] != "]":
        line += text.count("\n", counted, position)
        counted = position
        where = Where(source, line)
        try:
            value, end = strict.raw_decode(text, position)
            row = _row_or_rejected(value, where, text.count("[", position, end) + text.count("{", position, end))
        except (ValueError, RecursionError) as error:
            end = lenient.raw_decode(text, position)[1]
            row = Rejected(_why_invalid(error), where)
        position = end
        yield row
        position = _skip_separators(text, position)
