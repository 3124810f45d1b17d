"""Stored bytes: a data file here or behind fsspec, unpacked as it is read, with every failure as a DataError."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import posixpath
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from llmkit.data.frames import Frames
from llmkit.errors import DataError

COMPRESSION_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
UNPACKED_BYTES = 1 << 30
UNPACKED_TIMES = 1000  # ordinary repetitive rows shrink a hundred times
_BUFFER_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows: its file system (None: this machine) opens `path`, and `name` is what a person calls it.

    With `documents`, a file whose suffix tells no format is text: one document.
    """

    path: str
    name: str
    filesystem: Any = None
    documents: bool = False

    @property
    def suffix(self) -> str:
        """The suffix that tells the format, in lower case, with a compression suffix taken off."""
        return data_suffix(self.name)

    @property
    def compression(self) -> str | None:
        """The compression suffix, or None."""
        return _suffixes(self.name)[1]

    def open_stored(self) -> BinaryIO:
        """The bytes as they are stored; what is appended to a local file after it was opened is not read."""
        if self.filesystem is not None:
            return cast(BinaryIO, self.filesystem.open(self.path, "rb"))
        path = Path(self.path)
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # to open a pipe would wait for its writer
            raise DataError(
                "a data file is not a regular file",
                got="a named pipe" if stat.S_ISFIFO(mode) else "a device or socket",
                expected="a file; what comes through a pipe must be written to one first",
                where=self.name,
            )
        return cast(BinaryIO, io.BufferedReader(_AsOpened(path.open("rb", buffering=0)), _BUFFER_BYTES))

    def digest(self) -> str:
        """SHA-256 of the stored bytes in hex. Raises DataError when they cannot be read."""
        with failures_named(self), self.open_stored() as file:
            sha = hashlib.sha256()
            while chunk := file.read(1 << 20):
                sha.update(chunk)
            return sha.hexdigest()

    @contextmanager
    def open_unpacked(self) -> Iterator[BinaryIO]:
        """The bytes after decompression, as a stream that reads only as far as it is asked to.

        It raises DataError where the file is damaged, or unpacks to more than `Allowance` has.
        """
        with self.open_stored() as stored, unpack(stored, self, Allowance(stored, self.name)) as file:
            yield file


def data_suffix(name: str) -> str:
    """The suffix that tells a file's format: `.jsonl` for `rows.JSONL.gz`, `.tar` for `rows.tgz`."""
    return _suffixes(name)[0]


def printable(name: str) -> str:
    """Text as it can be shown and written down: what is not UTF-8 in a name and what moves a terminal is escaped."""
    if name.isprintable():
        return name
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in name)


def _suffixes(name: str) -> tuple[str, str | None]:
    """The suffix that tells the format and that of the compression; of a chained URL, those of the first path in it."""
    parts = name.split("::")
    if "://" in parts[-1]:  # and else `::` is a part of the name, as in manuals of Perl
        name = next(part for part in parts if "://" in part)
    stem, last = posixpath.splitext(name.lower())
    if last == ".tgz":
        return ".tar", ".gz"
    if last in COMPRESSION_SUFFIXES:
        return posixpath.splitext(stem)[1], last
    return last, None


class _AsOpened(io.RawIOBase):
    """A local file that ends where it ended when it was opened."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._at = 0
        self._size = os.fstat(raw.fileno()).st_size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        with memoryview(buffer) as view:
            count = self._raw.readinto(view[: self._size - self._at]) or 0
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = self._raw.seek(start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        self._raw.close()
        super().close()


class Allowance:
    """What may still be unpacked of a stored file, over all its members and layers of compression.

    A file that unpacks to more than 1 GiB and to more than 1000 times its size is no data but a bomb.
    """

    def __init__(self, stored: BinaryIO, name: str) -> None:
        self._stored = stored
        self._name = name
        self._size = stored.seek(0, io.SEEK_END) if stored.seekable() else None
        if self._size is not None:
            stored.seek(0)
        self._spent = 0

    def spend(self, count: int) -> None:
        """Counts bytes that were unpacked. Raises DataError when they are too many."""
        self._spent += count
        if self._spent <= UNPACKED_BYTES:
            return
        size = self._size if self._size is not None else self._stored.tell()
        if self._spent > UNPACKED_TIMES * size:
            raise DataError(
                f"a data file unpacks to more than {UNPACKED_TIMES} times its size",
                got=f"{size:,} bytes that unpack to more than {self._spent:,}",
                expected=f"at most {UNPACKED_TIMES} times the size, or {UNPACKED_BYTES:,} bytes",
                hint="if you trust it, unpack it first and name the unpacked file",
                where=self._name,
            )


def unpack(stored: BinaryIO, file: DataFile, allowance: Allowance) -> BinaryIO:
    """A stream over the bytes of a file after decompression; its failures are DataErrors that name the file."""
    if file.compression is None:
        return stored
    inner = gzip.GzipFile(fileobj=stored, mode="rb") if file.compression == ".gz" else Frames(stored, file.compression)
    return guarded(inner, file, allowance)


def guarded(inner: Any, file: DataFile, allowance: Allowance) -> BinaryIO:
    """A forward stream over what unpacks, which spends its allowance and names the file when it fails."""
    return cast(BinaryIO, io.BufferedReader(_Guarded(inner, file, allowance), _BUFFER_BYTES))


class _Guarded(io.RawIOBase):
    def __init__(self, inner: Any, file: DataFile, allowance: Allowance) -> None:
        self._inner = inner
        self._file = file
        self._allowance = allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with failures_named(self._file):
            chunk = self._inner.read1(len(buffer))  # and not `read`, which loses what comes before the damage
        self._allowance.spend(len(chunk))
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def close(self) -> None:
        self._inner.close()
        super().close()


@contextmanager
def failures_named(file: DataFile) -> Iterator[None]:
    """Turns what the system and the decompressors raise into a DataError that names the file."""
    try:
        yield
    except FileNotFoundError:
        raise DataError("a data file is missing", got=file.name, where=file.name) from None
    except PermissionError:
        raise no_permission(file.name) from None
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        packed = file.compression is not None and not isinstance(error, IsADirectoryError)
        raise DataError(
            "a compressed data file is cut short or corrupt" if packed else "a data file cannot be read",
            got=str(error) or type(error).__name__,
            expected=f"a whole {file.compression} file" if packed else "a readable file",
            hint="copy or download it again",
            where=file.name,
        ) from error


def no_permission(name: str) -> DataError:
    """The error for a file or folder that this user may not read."""
    return DataError(
        "no permission to read the data",
        got=name,
        expected="a file and folders that this user may read",
        hint=f"chmod u+r {name}, or ask its owner",
        where=name,
    )
