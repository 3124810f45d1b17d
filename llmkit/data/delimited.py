"""Rows out of CSV and TSV files, with the line of every row and of every row refused."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from llmkit.data.readers import (
    BOM,
    Rejected,
    Row,
    Where,
    not_utf8,
    numbered_lines,
    refuse_utf16,
    shown,
)
from llmkit.errors import DataError

_LONGEST_RECORD_BYTES = 16 << 20  # bounds what an unclosed quote can swallow
_CONTINUES = "the line goes on with a record that is refused"


def read_csv(file: BinaryIO, source: str, *, delimiter: str = ",") -> Iterator[Row | Rejected]:
    """One row a record, its columns named by the first; every value is text, and a row's line is where it starts.

    A record that does not parse is refused line by line, since one stray quote joins many rows. Raises DataError for a
    header that is wrong, and for a record that does not end in time.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_RECORD_BYTES))
    lines = _Lines(file, source)
    reader = csv.reader(lines.decoded(), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        where = lines.begin_record()
        problem = None
        fields: list[str] = []
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = f"invalid CSV: {error}"
        parsed = problem is None
        if lines.undecodable is not None:
            problem = lines.undecodable
        elif any("\0" in field for field in fields):
            problem = "the row has a NUL byte"
        elif header and fields and len(fields) != len(header):
            problem = f"the row has {len(fields)} fields, the header has {len(header)}"
        if not header:
            header = _header(fields, problem, where)
        elif problem:
            yield Rejected(problem, where)
            if not parsed:
                yield from (
                    Rejected(_CONTINUES, Where(source, line)) for line in range(where.line + 1, lines.number + 1)
                )
        elif fields:
            yield Row(dict(zip(header, fields, strict=True)), where)


class _Lines:
    """The lines of a file as text, and what is to be known of the record that they make up."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        self.number = 0
        self.undecodable: str | None = None
        self._file = file
        self._source = source
        self._start = 1
        self._record_bytes = 0

    def begin_record(self) -> Where:
        """The place of the record that begins with the next line."""
        self.undecodable = None
        self._start = self.number + 1
        self._record_bytes = 0
        return Where(self._source, self._start)

    def decoded(self) -> Iterator[str]:
        """Each line; of one that is not UTF-8 the bytes become surrogates. Raises DataError when a record is too long."""
        for number, raw in numbered_lines(self._file):
            self.number = number
            self._record_bytes += len(raw or b"")
            if raw is None or self._record_bytes > _LONGEST_RECORD_BYTES:
                raise DataError(
                    f"a record of a CSV file is longer than {_LONGEST_RECORD_BYTES >> 20} MiB",
                    got=f"it begins in line {self._start} and has not ended in line {self.number}",
                    expected="a record that ends",
                    hint="a quote that opens there may never close",
                    where=f"{self._source}:{self._start}",
                )
            if self.number == 1:
                refuse_utf16(raw, self._source)
                raw = raw.removeprefix(BOM)
            try:
                yield raw.decode("utf-8")
            except UnicodeDecodeError as error:
                self.undecodable = self.undecodable or not_utf8(error, "line")
                yield raw.decode("utf-8", errors="surrogateescape")


def _header(fields: list[str], problem: str | None, where: Where) -> list[str]:
    repeated = next((name for name, count in Counter(fields).items() if count > 1), None)
    if repeated is not None:
        problem = f"two columns are called `{shown(repeated)}`"
    if problem:
        expected = "a first line that names each column once"
        raise DataError("the header of a CSV file is wrong", got=problem, expected=expected, where=where)
    return fields
