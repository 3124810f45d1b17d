"""The newest that metrics.jsonl tells of a stage, read from its end: a log may be large, and there may be many."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

_TAILS = (2**16, 2**20)  # bytes of the end of the file: most runs need only the first


def newest_logged(file: Path, stage: str, *, held_out: bool) -> dict[str, Any]:
    """The newest `step`, `loss`, `eval_loss` and `event` of a stage, as far as the end of a metrics.jsonl tells.

    With `held_out`, more of the file is read for a held-out loss. What is damaged is passed over.
    """
    found: dict[str, Any] = {}
    for most in _TAILS:
        tail, complete = _tail(file, most)
        lines = {key: _last_with(tail, key, stage) for key in ("step", "loss", "eval_loss", "event")}
        found = {key: line[key] for key, line in lines.items() if line is not None}
        if "event" in found:
            found["event"] = _event(lines["event"] or {})
        if complete or ("loss" in found and ("eval_loss" in found or not held_out)):
            break
    return found


def _last_with(tail: bytes, key: str, stage: str) -> dict[str, Any] | None:
    """The last of some lines that is of a stage and has a value of the right type for a key."""
    needle, end = b'"' + key.encode() + b'"', len(tail)
    while (place := tail.rfind(needle, 0, end)) >= 0:
        start = tail.rfind(b"\n", 0, place) + 1
        line = tail[start : tail.find(b"\n", place) + 1 or len(tail)]
        end = start
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(values, dict) or values.get("stage") != stage or whole(values.get("step")) is None:
            continue
        if isinstance(values.get(key), str) if key == "event" else number(values.get(key)) is not None:
            return values
    return None


def _event(line: dict[str, Any]) -> str:
    why = f": {line['why']}" if line.get("why") else ""
    return f"step {line['step']} {line['event']}{why}"


def _tail(file: Path, most: int) -> tuple[bytes, bool]:
    """The whole lines among the last bytes of a file, and whether those are all of its bytes."""
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - most))
            read = opened.read(most)
    except OSError:
        return b"", True
    return (read, True) if size <= most else (read[read.find(b"\n") + 1 :], False)


def whole(value: Any) -> int | None:
    """A JSON value that is a whole number, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def number(value: Any) -> float | None:
    """A JSON value that is a finite number, or None."""
    try:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return None
    return float(value) if ok else None
