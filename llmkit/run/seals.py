"""What run.json remembers of a finished file, so that a change to it is noticed: its size, checksum and time of change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmkit.files import digest_file

Seal = dict[str, Any]  # "bytes", "sha256", "mtime_ns"


def seal(path: Path, sha256: str | None = None) -> Seal:
    """The seal of a file as it is; its checksum is computed unless it is known."""
    found = path.stat()
    return {"bytes": found.st_size, "sha256": sha256 or digest_file(path), "mtime_ns": found.st_mtime_ns}


def holds(path: Path, expected: Seal | int) -> bool:
    """True when a file is what it was. One with the same time of change is not read; a run of before 0.2 has sizes only."""
    if not path.is_file():
        return False
    found = path.stat()
    if isinstance(expected, int):
        return found.st_size == expected
    if found.st_size != expected["bytes"]:
        return False
    return found.st_mtime_ns == expected["mtime_ns"] or digest_file(path) == expected["sha256"]
