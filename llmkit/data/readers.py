"""What a reader gives, rows with their places and rows refused, and how it gets at lines and whole texts.

One bad row is a `Rejected`, so that the caller can count and name it; a file that is wrong as a whole is a DataError.
No row may be larger than LONGEST_ROW_BYTES, so that memory stays bounded whatever a file holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from llmkit.data.storage import printable
from llmkit.errors import DataError

BOM = b"\xef\xbb\xbf"
LONGEST_ROW_BYTES = 64 << 20
TOO_LONG = f"longer than {LONGEST_ROW_BYTES >> 20} MiB"
_CHUNK_BYTES = 1 << 20
_SHOWN_CHARS = 60


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


def shown(value: Any) -> str:
    """A value of the data, fit for a message: short, on one line and printable."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists thousands deep
        text = type_name(value)
    return printable(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def not_utf8(error: UnicodeDecodeError, of: str) -> str:
    """The reason for refusing bytes, which says where the first bad one is."""
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start} of the {of}"


def refuse_utf16(start: bytes, source: str) -> None:
    """Raises DataError when a file starts as UTF-16 does: with its mark, or with every second byte zero."""
    marked = start.startswith((b"\xff\xfe", b"\xfe\xff"))
    zeros = [byte == 0 for byte in start[:4]]
    if marked or zeros in ([False, True, False, True], [True, False, True, False]):
        raise DataError(
            "a data file is UTF-16",
            got=f"it starts with {start[: 2 if marked else 4].hex(' ')}",
            expected="UTF-8",
            hint=f"iconv -f {'UTF-16' if marked else 'UTF-16BE' if zeros[0] else 'UTF-16LE'} -t UTF-8 OLD > NEW",
            where=f"{source}:1",
        )


def numbered_lines(file: BinaryIO, lines_before: int = 0) -> Iterator[tuple[int, bytes | None]]:
    """The lines, from 1; None in place of one that is longer than a row may be, which is never held in memory whole."""
    number = lines_before
    while line := file.readline(LONGEST_ROW_BYTES + 1):
        number += 1
        if len(line) <= LONGEST_ROW_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_CHUNK_BYTES)
        yield number, None


def whole(file: BinaryIO, most_bytes: int) -> bytes | None:
    """All bytes of a file, or None when it has more."""
    raw = bytearray()
    while chunk := file.read(_CHUNK_BYTES):
        raw += chunk
        if len(raw) > most_bytes:
            return None
    return bytes(raw)


def read_text(file: BinaryIO, source: str) -> Iterator[Row | Rejected]:
    """One document a file: a row `{"text": the whole text}` at line 1, as it is, without its byte order mark."""
    raw = whole(file, LONGEST_ROW_BYTES)
    if raw is None:
        yield Rejected(f"the document is {TOO_LONG}", Where(source, 1))
        return
    refuse_utf16(raw, source)
    raw = raw.removeprefix(BOM)
    reason, at = None, raw.find(b"\0")
    try:
        text = raw.decode("utf-8")
        reason = "the text has a NUL byte" if at >= 0 else None
    except UnicodeDecodeError as error:
        reason, at = not_utf8(error, "file"), error.start
    if reason is not None:
        yield Rejected(reason, Where(source, raw.count(b"\n", 0, at) + 1))
    elif text.strip():
        yield Row({"text": text}, Where(source, 1))
