"""Tar and zip archives as sources: the data files in them, one after the other as they lie in the archive.

Nothing is unpacked to a path: a member is read as a stream (Parquet and Arrow, whose end is read first, through a nameless
temporary file), links and devices are not followed, and all that is unpacked of an archive shares one `Allowance`.
"""

from __future__ import annotations

import errno
import io
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from llmkit.data.columnar import seekable
from llmkit.data.readers import Rejected, Row, Where
from llmkit.data.storage import Allowance, DataFile, failures_named, printable, unpack
from llmkit.errors import DataError, LlmkitError

ARCHIVE_SUFFIXES = (".tar", ".zip")
_TAR_HEADERS_BYTES = 1 << 20  # of one member; what they say of their own length is not believed
_BUFFER_BYTES = 1 << 18
_PIECE_BYTES = 1 << 14  # of which tarfile and zipfile lose the one with the damage
_NAMES_SHOWN = 5

Reader = Callable[[BinaryIO, str], Iterator[Row | Rejected]]
Member = tuple[str, BinaryIO | str]  # its name, and its bytes until the next member is asked for, or why there are none


def read_archive(
    archive: DataFile, reader_of: Callable[[str], Reader | None], expected: str
) -> Iterator[Row | Rejected]:
    """The rows of all members that `reader_of` has a reader for, which must be the same for all.

    A member that is no ordinary file is refused by name. Raises DataError when the archive is damaged, holds another
    archive, mixes formats or has no data files.
    """
    first: tuple[Reader, str] | None = None
    any_data = False
    passed_over: list[str] = []
    with archive.open_stored() as stored:
        allowance = Allowance(stored, archive.name)
        with unpack(stored, archive, allowance) as stream:
            for name, member in _members(stream, archive, allowance):
                file = DataFile("", f"{archive.name}!/{name}")
                reader = reader_of(name)
                if file.suffix in ARCHIVE_SUFFIXES:
                    raise _nested(file)
                any_data = any_data or reader is not None
                if reader is None:
                    passed_over += [name] if len(passed_over) < _NAMES_SHOWN else []
                elif isinstance(member, str):
                    yield Rejected(member, Where(file.name, 1))
                elif first is not None and reader is not first[0]:
                    raise _mixed(archive, first[1], name)
                else:
                    first = first or (reader, name)
                    yield from _rows_or_rejected(member, file, reader, allowance)
    if not any_data:
        raise DataError(
            "an archive has no data files",
            got=", ".join(passed_over) or "no files",
            expected=expected,
            where=archive.name,
        )


def _rows_or_rejected(
    member: BinaryIO, file: DataFile, reader: Reader, allowance: Allowance
) -> Iterator[Row | Rejected]:
    empty = True
    with failures_named(file), unpack(member, file, allowance) as stream:
        for row in reader(stream, file.name):
            empty = False
            yield row
    if empty:
        yield Rejected("the file has no rows", Where(file.name, 1))


def _members(stream: BinaryIO, archive: DataFile, allowance: Allowance) -> Iterator[Member]:
    if archive.suffix == ".zip":
        return _zip_members(stream, archive, allowance)
    return _tar_members(stream, archive)


def _tar_members(stream: BinaryIO, archive: DataFile) -> Iterator[Member]:
    forward = _Forward(stream)
    with _damage_named(archive.name):
        tar: Any = tarfile.TarFile(
            fileobj=cast(Any, forward), encoding="utf-8", errors="backslashreplace", errorlevel=2
        )
    while True:
        with _damage_named(archive.name), forward.headers():
            member = tar.next()
            tar.members.clear()  # it would keep them all
        if member is None:
            break
        name = _inner_name(member.name)
        problem = _why_outside(name)
        if member.issym() or member.islnk():
            problem = "the file is a link, which is not followed"
        elif not member.isreg():
            problem = "the file is a device or pipe"
        elif member.issparse():
            problem = "the file is sparse"
        if problem is None:
            yield name, _stream(tar.extractfile(member), f"{archive.name}!/{name}")
        elif not member.isdir():
            yield name, problem
    with _damage_named(archive.name):
        forward.check_end()


def _zip_members(stream: BinaryIO, archive: DataFile, allowance: Allowance) -> Iterator[Member]:
    with seekable(stream) as file:
        with _damage_named(archive.name):
            zipped = zipfile.ZipFile(file)
        for member in zipped.infolist():
            if member.filename.endswith("/"):
                continue
            name = _inner_name(member.filename)
            problem = _why_outside(name)
            if stat.S_ISLNK(member.external_attr >> 16):
                problem = "the file is a link, which is not followed"
            elif member.flag_bits & 1:
                problem = "the file is encrypted"
            if problem is not None:
                yield name, problem
                continue
            with _damage_named(f"{archive.name}!/{name}"):
                opened = zipped.open(member)
            with _stream(opened, f"{archive.name}!/{name}", allowance) as unzipped:
                yield name, unzipped


def _inner_name(name: str) -> str:
    return printable(name.removeprefix("./").lstrip("/"))


def _why_outside(name: str) -> str | None:
    return "the file's name leads out of the archive" if ".." in name.split("/") else None


def _stream(member: Any, name: str, allowance: Allowance | None = None) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_MemberStream(member, name, allowance), _BUFFER_BYTES))


class _MemberStream(io.RawIOBase):
    """The bytes of a member, forwards only, with its name where it is damaged."""

    def __init__(self, member: Any, name: str, allowance: Allowance | None) -> None:
        self._member = member
        self._name = name
        self._allowance = allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _damage_named(self._name):
            chunk = self._member.read1(min(len(buffer), _PIECE_BYTES))
        if self._allowance is not None:
            self._allowance.spend(len(chunk))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._member.close()
        super().close()


class _Forward:
    """A stream read from front to back, with the little that tarfile asks of a file.

    tarfile believes what a header says: that a name takes gigabytes, or that the next member begins before this one.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._at = 0
        self._left_for_headers: int | None = _TAR_HEADERS_BYTES
        self._last_header = b""

    @contextmanager
    def headers(self) -> Iterator[None]:
        """What is read now is headers."""
        self._left_for_headers = _TAR_HEADERS_BYTES
        yield
        self._left_for_headers = None

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise tarfile.ReadError("a member begins before the one ahead of it ends")
        if self._stream.seekable():
            self._stream.seek(position)
            self._at = position
        while self._at < position and (skipped := self._stream.read(min(position - self._at, _BUFFER_BYTES))):
            self._at += len(skipped)

    def read(self, count: int) -> bytes:
        if self._left_for_headers is not None:
            self._left_for_headers -= count
            if self._left_for_headers < 0:
                raise tarfile.ReadError(f"the headers of a member are longer than {_TAR_HEADERS_BYTES:,} bytes")
        data = self._stream.read(count)
        self._at += len(data)
        if self._left_for_headers is not None:
            self._last_header = data
        return data

    def check_end(self) -> None:
        """Raises ReadError unless the last header was the end mark, two blocks of zeros, with nothing behind."""
        if len(self._last_header) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without an end mark")
        if any(self._last_header):
            raise tarfile.ReadError(f"no valid header at byte {self._at - tarfile.BLOCKSIZE}")
        while chunk := self._stream.read(_BUFFER_BYTES):
            if chunk.count(0) < len(chunk):
                raise tarfile.ReadError("something follows the end mark")


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Whatever tarfile and zipfile meet in an archive is its damage."""
    try:
        yield
    except (LlmkitError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which says that an archive led out of its file
            raise
        raise DataError(
            "an archive is cut short or corrupt",
            got=str(error) or type(error).__name__,
            expected="a whole archive",
            hint="copy or download it again",
            where=name,
        ) from error


def _nested(file: DataFile) -> DataError:
    return DataError(
        "an archive lies inside an archive",
        got=file.name,
        expected="an archive of data files",
        hint="unpack the outer one and name the inner ones",
        where=file.name,
    )


def _mixed(archive: DataFile, first: str, other: str) -> DataError:
    return DataError(
        "an archive mixes formats",
        got=f"{first}, {other}",
        expected="data files of one format",
        hint="unpack it and name the files that you mean",
        where=f"{archive.name}!/{other}",
    )
