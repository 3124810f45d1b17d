"""Stored bytes: a data file here or behind fsspec, unpacked as it is read, with every failure as a DataError."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from llmkit.errors import DataError

COMPRESSION_SUFFIXES = (".gz", ".xz", ".bz2", ".zst")
_CHUNK_BYTES = 8192


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows: its file system (None: this machine) opens `path`, and `name` is what a person calls it."""

    path: str
    name: str
    filesystem: Any = None

    @property
    def suffix(self) -> str:
        """The suffix that tells the format, in lower case, with a compression suffix taken off."""
        return data_suffix(self.name)

    @property
    def compression(self) -> str | None:
        """The compression suffix, or None."""
        suffix = PurePosixPath(self.name.partition("::")[0]).suffix.lower()
        return suffix if suffix in COMPRESSION_SUFFIXES else None

    def open_stored(self) -> BinaryIO:
        """The bytes as they are stored."""
        if self.filesystem is None:
            return Path(self.path).open("rb")
        return cast(BinaryIO, self.filesystem.open(self.path, "rb"))

    def digest(self) -> str:
        """SHA-256 of the stored bytes in hex. Raises DataError when they cannot be read."""
        with failures_named(self), self.open_stored() as file:
            sha = hashlib.sha256()
            while chunk := file.read(1 << 20):
                sha.update(chunk)
            return sha.hexdigest()

    @contextmanager
    def open_unpacked(self) -> Iterator[BinaryIO]:
        """The bytes after decompression, as a stream that reads only as far as it is asked to."""
        with self.open_stored() as stored, unpack(stored, self.compression) as file:
            yield file


def data_suffix(name: str) -> str:
    """The suffix that tells a file's format (`.jsonl` for `rows.JSONL.gz`); the first part of a chained URL counts."""
    path = PurePosixPath(name.partition("::")[0])
    if path.suffix.lower() in COMPRESSION_SUFFIXES:
        path = path.with_suffix("")
    return path.suffix.lower()


def unpack(stored: BinaryIO, compression: str | None) -> BinaryIO:
    """A stream over the decompressed bytes; a file cut short makes it raise EOFError."""
    if compression == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stored, mode="rb"))
    if compression == ".bz2":
        return cast(BinaryIO, bz2.BZ2File(stored))
    if compression == ".xz":
        return cast(BinaryIO, lzma.LZMAFile(stored))
    if compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(stored), 1 << 16))
    return stored


class _ZstdStream(io.RawIOBase):
    """Zstandard frames as a stream of bytes.

    The reader of the zstandard package, which fsspec uses too, ends without a word where a frame was cut short and
    does not give lines; this one raises EOFError, as the standard library does for the other compressions.
    """

    def __init__(self, stored: BinaryIO) -> None:
        import zstandard

        self._stored = stored
        self._damaged = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._packed = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._packed = self._packed or self._stored.read(_CHUNK_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            self._unpack_chunk()
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack_chunk(self) -> None:
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            self._ready = self._frame.decompress(self._packed)
        except self._damaged as error:
            raise OSError(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None


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
