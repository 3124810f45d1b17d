"""Files against the sizes and checksums that they should have: each is read once, several at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

_AT_ONCE = 2**22  # bytes that are read at once
_THREADS = 4  # hashing lets go of the interpreter's lock
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Expected:
    """What a file should be; without a checksum only its size is known."""

    path: Path
    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class Fault:
    """How a file is not what it should be."""

    what: str
    got: str
    expected: str
    hint: str | None = None  # where that depends on how it is wrong


def compare(files: Sequence[Expected], progress: Callable[[int], Advance]) -> list[Fault | None]:
    """What is wrong with each file, in order. `progress` is told of all bytes to read; what it gives, of those read."""
    faults = {expected: _fault_at_sight(expected) for expected in files}
    unread = [e for e, fault in faults.items() if fault is None and e.sha256 is not None]
    places = list({e.path: None for e in unread})
    advance = progress(sum({e.path: e.nbytes for e in unread}.values()))
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        digests = dict(zip(places, pool.map(lambda path: _digest(path, advance), places), strict=True))
    for expected in unread:
        digest = digests[expected.path]
        if isinstance(digest, OSError):
            faults[expected] = _unreadable(digest)
        elif digest != expected.sha256:
            faults[expected] = Fault("a file is damaged", f"SHA-256 {digest}", f"SHA-256 {expected.sha256}")
    return [faults[expected] for expected in files]


def _fault_at_sight(expected: Expected) -> Fault | None:
    """What is wrong with a file that can be told without reading it."""
    try:
        size = expected.path.stat().st_size
    except FileNotFoundError:
        return Fault("a file is missing", "no file", f"{expected.nbytes:,} bytes")
    except OSError as error:
        return _unreadable(error)
    if not expected.path.is_file():
        return Fault("a file is something else", "no regular file", f"{expected.nbytes:,} bytes")
    if size != expected.nbytes:
        return Fault("a file has another size", f"{size:,} bytes", f"{expected.nbytes:,} bytes")
    return None


def _unreadable(error: OSError) -> Fault:
    got = error.strerror or str(error)
    return Fault("a file cannot be read", got, "to read it", "look at its permissions, and at the disk")


def _digest(path: Path, advance: Advance) -> str | OSError:
    """SHA-256 in hex, or why there is none."""
    digest, buffer = sha256(), bytearray(_AT_ONCE)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
                advance(count)
    except OSError as error:
        return error
    return digest.hexdigest()
