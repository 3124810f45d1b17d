"""Sources cut into pieces that can be read apart from each other, by any process."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

from llmkit.data.readers import Rejected, Row, Where
from llmkit.data.sources import files_of, read_file, read_rows
from llmkit.data.storage import DataFile, failures_named

PIECE_BYTES = 16 << 20
_BY_LINE = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Piece:
    """Some files of a source, a range of bytes of one file, or without files the whole source behind the URI.

    `line` is how many lines of the file come before `start`. Without an end, the first `skip` rows are left out, and it
    goes on to `most_chars` characters.
    """

    uri: str
    files: tuple[DataFile, ...] = ()
    start: int = 0
    end: int | None = None
    line: int = 0
    alone: bool = True  # it is the only piece of its source
    format: str | None = None  # that the recipe names
    skip: int = 0
    most_chars: int | None = None

    def rows(self) -> Iterator[Row | Rejected]:
        """The rows, each with its place, and those that could not be read. Raises DataError as `read_rows` does."""
        if self.most_chars is not None:
            yield from self._some()
            return
        if not self.files:
            yield from read_rows(self.uri, self.format)
        for file in self.files:
            empty = True
            for row in self._rows_of(file):
                empty = False
                yield row
            if empty and self.end is None and not (self.alone and len(self.files) == 1):
                yield Rejected("the file has no rows", Where(file.name, 1))

    def _some(self) -> Iterator[Row | Rejected]:
        chars = 0
        rows = read_file(self.files[0]) if self.files else read_rows(self.uri, self.format)
        for row in islice(rows, self.skip, None):
            yield row
            chars += len(str(row.values)) if isinstance(row, Row) else 0
            if chars >= (self.most_chars or 0):
                return

    def _rows_of(self, file: DataFile) -> Iterator[Row | Rejected]:
        if self.end is None:
            yield from read_file(file)
            return
        with failures_named(file), file.open_stored() as stored:
            stored.seek(self.start)
            part = cast(BinaryIO, io.BufferedReader(_Range(stored, self.end - self.start), 1 << 18))
            yield from read_file(file, part, self.line)


def pieces_of(uri: str, format: str | None = None, piece_bytes: int = PIECE_BYTES) -> list[Piece]:
    """A source as pieces of about so many bytes, in the order of its rows. Raises DataError as `read_rows` does.

    Only JSON Lines that are not compressed are cut; small files are put together.
    """
    files = files_of(uri, format)
    if files is None:
        return [Piece(uri, format=format)]
    pieces: list[Piece] = []
    small: list[DataFile] = []
    small_bytes = 0
    for file in files:
        size = _size(file)
        if size > piece_bytes and is_seekable(file) and not _is_blank(file):
            pieces += [Piece(uri, tuple(small))] * bool(small)
            small, small_bytes = [], 0
            pieces += [Piece(uri, (file,), *cut) for cut in _cuts(file, piece_bytes)]
            continue
        small.append(file)
        small_bytes += size
        if small_bytes >= piece_bytes:
            pieces.append(Piece(uri, tuple(small)))
            small, small_bytes = [], 0
    pieces += [Piece(uri, tuple(small))] * bool(small)
    return pieces if len(pieces) == 1 else [replace(piece, alone=False) for piece in pieces]


def is_seekable(file: DataFile) -> bool:
    """True when rows can be read from the middle on."""
    return file.suffix in _BY_LINE and file.compression is None and file.filesystem is None


def next_range(file: DataFile, start: int, piece_bytes: int) -> int:
    """Where about so many bytes from `start` on end with a line; `start` itself at the end of the file."""
    with failures_named(file), file.open_stored() as stored:
        stored.seek(start)
        while chunk := stored.read(min(piece_bytes, 1 << 20)):
            found = chunk.rfind(b"\n") + 1
            if stored.tell() - start >= piece_bytes and found:
                return stored.tell() - len(chunk) + found
        return stored.tell()


def stored_bytes(pieces: list[Piece]) -> int:
    """About how many bytes are to be read; a source that is no files counts nothing."""
    return sum(piece.end - piece.start if piece.end is not None else sum(map(_size, piece.files)) for piece in pieces)


def _size(file: DataFile) -> int:
    if file.filesystem is not None:
        return int(file.filesystem.size(file.path) or 0)
    path = Path(file.path)
    return path.stat().st_size if path.is_file() else 0


def _cuts(file: DataFile, piece_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and the lines before, for ranges that end with a line."""
    with failures_named(file), file.open_stored() as stored:
        start = position = lines = before = 0
        while chunk := stored.read(1 << 20):
            position += len(chunk)
            found = chunk.rfind(b"\n") + 1
            if position - start < piece_bytes or not found:
                lines += chunk.count(b"\n")
                continue
            lines += chunk.count(b"\n", 0, found)
            end = position - len(chunk) + found
            yield start, end, before
            start, before = end, lines
            lines += chunk.count(b"\n", found)
        if position > start:
            yield start, position, before


def _is_blank(file: DataFile) -> bool:
    with failures_named(file), file.open_stored() as stored:
        return not any(chunk.strip() for chunk in iter(lambda: stored.read(1 << 20), b""))


class _Range(io.RawIOBase):
    """The next `left` bytes of a file."""

    def __init__(self, stored: BinaryIO, left: int) -> None:
        self._stored = stored
        self._left = left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        chunk = self._stored.read(min(len(buffer), self._left))
        buffer[: len(chunk)] = chunk
        self._left -= len(chunk)
        return len(chunk)
