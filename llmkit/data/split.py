"""Which rows are held out: decided by what a row says, so that a duplicate never stands on both sides."""

from __future__ import annotations

import hashlib
import json
from typing import Any

_SCALE = float(1 << 64)


def position(row: dict[str, Any], salt: str = "split") -> float:
    """A number from 0 up to 1 that depends on the row's content alone, evenly spread over different rows.

    Letter case and how much white space stands where do not count, so that near-copies of that kind stay together.
    """
    text = json.dumps(_normalised(row), sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(f"{salt}\0{text}".encode()).digest()[:8], "big") / _SCALE


def held_out(positions: list[float], share: float) -> list[bool]:
    """For each row's position whether it is held out.

    The rows below `share` are; when a small data set has none there, the lowest position is. Growing the data moves no
    row from one side to the other except that single one. A data set of one distinct row has nothing to hold out.
    """
    if len(set(positions)) < 2:
        return [False] * len(positions)
    chosen = [p < share for p in positions]
    if any(chosen) and not all(chosen):
        return chosen
    lowest = min(positions)
    return [p == lowest for p in positions]


def copies(row: dict[str, Any], weight: float) -> int:
    """How often a row of a source with this weight stands in an epoch: 0.5 takes half of the rows, 2.5 each 2 or 3 times."""
    whole = int(weight)
    return whole + (position(row, "weight") < weight - whole)


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {key: _normalised(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normalised(item) for item in value]
    return value
