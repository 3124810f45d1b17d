"""What the zoo of broken inputs is made of: cases, builders of files, and how a case is proved."""

from __future__ import annotations

import io
import json
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmkit.data.rows import choose_format, convert
from llmkit.data.sources import Rejected, Row, read_rows
from llmkit.errors import DataError

ONE, TWO, THREE = (b'{"text": "%s"}\n' % word for word in (b"one", b"two", b"three"))
ROWS = [{"text": f"row {number}"} for number in range(2000)]
MANY = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def line(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def chat(*turns: tuple[Any, Any], **more: Any) -> bytes:
    return line(messages=[{"role": role, "content": content} for role, content in turns], **more)


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def arrow(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def tar(*members: tuple[str, bytes] | tarfile.TarInfo, end: bool = True) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for member in members:
            info, content = (
                (member, b"") if isinstance(member, tarfile.TarInfo) else (tarfile.TarInfo(member[0]), member[1])
            )
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        size = archive.offset
    return sink.getvalue() if end else sink.getvalue()[:size]


def header(name: str, kind: bytes, size: int) -> bytes:
    """A block that says what it likes."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return sink.getvalue()


def zip_link(name: str, target: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        info = zipfile.ZipInfo(name)
        info.external_attr = 0o120777 << 16
        archive.writestr(info, target)
        archive.writestr("a.jsonl", ONE)
    return sink.getvalue()


def changed(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content
    return content.replace(old, new)


@dataclass(frozen=True)
class Case:
    """A broken input, how many rows of it are good (at least, where it ends in an error), and what is refused where.

    `content` is of the file, or a function that is given a folder and gives the content, or the URI of what it made there.
    `at` is where the error is, by default the file.
    """

    name: str
    content: bytes | Callable[[Path], bytes | str]
    file: str = "a.jsonl"
    good: int = 0
    refused: dict[str, str] = field(default_factory=dict)  # place -> reason, of which it is a part
    error: str | None = None
    at: str | None = None
    kind: str = "text"

    def __str__(self) -> str:
        return self.name

    def uri(self, folder: Path) -> str:
        """The broken input, made in a folder."""
        content = self.content(folder) if callable(self.content) else self.content
        if isinstance(content, str):
            return content
        (folder / self.file).write_bytes(content)
        return str(folder / self.file)


NO_ROWS = "the data has no rows"
CORRUPT = "a compressed data file is cut short or corrupt"
BAD_ARCHIVE = "an archive is cut short or corrupt"


@contextmanager
def no_hang() -> Iterator[None]:
    """What waits for ever, as for the writer of a pipe, fails."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(120)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Outcome:
    good: list[dict[str, Any]] = field(default_factory=list)
    refused: list[Rejected] = field(default_factory=list)
    error: DataError | None = None


def outcome(uri: str, kind: str) -> Outcome:
    """What a source gives, as a stage would take it."""
    found = Outcome()
    rows: list[Row] = []
    try:
        for row in read_rows(uri):
            (rows if isinstance(row, Row) else found.refused).append(row)  # type: ignore[arg-type]
    except DataError as error:
        found.error = error
    if not rows:
        return found
    try:
        fmt = choose_format(rows[:20], kind, name=None, columns=None, where="data.train")
    except DataError as error:
        found.error = error
        return found
    for row in rows:
        converted = convert(row, fmt)
        (found.refused if isinstance(converted, Rejected) else found.good).append(converted)  # type: ignore[arg-type]
    return found


def check(case: Case, tmp_path: Path) -> None:
    """Reads a broken input, and proves that it ends as it must."""
    with no_hang():
        found = outcome(case.uri(tmp_path), case.kind)
    if case.error is None:
        assert found.error is None
        assert len(found.good) == case.good
    else:
        assert found.error is not None
        assert case.error in found.error.what
        assert found.error.got
        assert str(found.error.where).endswith(case.file if case.at is None else case.at)
        assert len(found.good) >= case.good
        str(vars(found.error)).encode()
    assert len(found.refused) == len(case.refused)
    for row, (place, reason) in zip(sorted(found.refused, key=place_of), case.refused.items(), strict=True):
        assert str(row.where).endswith(place if ":" in place else f"{case.file}:{place}")
        assert reason in row.reason
        assert len(row.reason) < 200
        (row.reason + row.where.source).encode()


def place_of(row: Rejected) -> tuple[str, int]:
    return row.where.source, row.where.line
