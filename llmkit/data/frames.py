"""Bzip2, xz and Zstandard as streams of bytes that pass over no damage."""

from __future__ import annotations

import bz2
import lzma
from functools import partial
from typing import Any, BinaryIO

_CHUNK_BYTES = 1 << 14
_ZSTD_CHUNK_BYTES = 1 << 10  # unpacks to 32 MiB at most
_XZ_MEMORY_BYTES = 1 << 29  # `xz -9` asks for a tenth of that


class Frames:
    """Compressed frames that follow each other, unpacked a bounded piece at a time.

    Unlike the file objects of the bz2, lzma and zstandard modules it passes over nothing: a last frame that was cut short
    is an EOFError, and so is an OSError what follows a frame and is none (zero padding apart).
    """

    def __init__(self, stored: BinaryIO, compression: str) -> None:
        self._stored = stored
        self._new_frame: Any = None
        self._damaged: type[Exception] = OSError
        self._packed_bytes = _CHUNK_BYTES
        if compression == ".bz2":
            self._new_frame = bz2.BZ2Decompressor
        elif compression == ".xz":
            self._new_frame, self._damaged = partial(lzma.LZMADecompressor, memlimit=_XZ_MEMORY_BYTES), lzma.LZMAError
        else:
            import zstandard

            self._new_frame, self._damaged = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
            self._packed_bytes = _ZSTD_CHUNK_BYTES
        self._frame: Any = None
        self._frames_begun = 0
        self._packed = b""
        self._ready = memoryview(b"")

    def read1(self, count: int) -> memoryview:
        """Up to so many bytes; none at the end."""
        while not self._ready and self._more_packed():
            self._unpack(count)
        taken, self._ready = self._ready[:count], self._ready[count:]
        return taken

    def _more_packed(self) -> bool:
        """Sees to it that there is a frame with something to unpack; False at the end of the file."""
        while not self._packed and getattr(self._frame, "needs_input", True):
            self._packed = self._stored.read(self._packed_bytes)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return False
            if self._frame is None and self._frames_begun:
                self._packed = self._packed.lstrip(b"\0")
        return True

    def _unpack(self, count: int) -> None:
        if self._frame is None:
            self._frame = self._new_frame()
            self._frames_begun += 1
        at_most = (count,) if hasattr(self._frame, "needs_input") else ()
        try:
            self._ready = memoryview(self._frame.decompress(self._packed, *at_most))
        except self._damaged as error:
            raise OSError(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data.lstrip(b"\0"), None

    def close(self) -> None:
        """Lets go of what was unpacked; the file is closed by who opened it."""
        self._ready = memoryview(b"")
