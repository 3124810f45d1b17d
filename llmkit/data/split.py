"""Which rows are held out: decided by what a row says, so that a duplicate never stands on both sides."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

_SCALE = float(1 << 64)


def position(row: dict[str, Any], salt: str = "split") -> float:
    """A number from 0 up to 1 that depends on the row's content alone, evenly spread over different rows.

    Letter case and how much white space stands where do not count, so that near-copies of that kind stay together.
    """
    text = json.dumps(_normalised(row), sort_keys=True, ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(f"{salt}\0{text}".encode()).digest()[:8], "big") / _SCALE


@dataclass(frozen=True)
class Share:
    """Which rows are held out: those below a share, the lowest `count`, or one of so many folds."""

    share: float = 0.0
    count: int = 0
    fold: tuple[int, int] | None = None  # (2, 5): the second of five


def held_out(positions: np.ndarray, wanted: Share, strata: np.ndarray | None = None) -> np.ndarray:
    """For each row's position, shape (N,), whether it is held out; rows of equal position stay together.

    With a share the rows below it are; when a small data set has none there, the lowest position is. Growing the data
    moves no row from one side to the other except that single one. A data set of one distinct row has nothing to hold
    out. With `strata`, shape (N,), of the rows of each stratum the same share is held out, as near as whole rows allow.
    """
    distinct, first, ranks = np.unique(positions, return_index=True, return_inverse=True)
    if len(distinct) < 2:
        return np.zeros(len(positions), bool)
    rows_of = np.bincount(ranks)
    if strata is not None or wanted.fold is not None:
        of = np.zeros(len(distinct), np.int64) if strata is None else np.unique(strata[first], return_inverse=True)[1]
        chosen = _by_stratum(of, rows_of, wanted)
    elif wanted.count:
        chosen = np.cumsum(rows_of) <= wanted.count
    else:
        chosen = distinct < wanted.share
    if wanted.fold is None and (chosen.all() or not chosen.any()):
        chosen = np.arange(len(distinct)) == 0
    return np.asarray(chosen[ranks])


def _by_stratum(strata: np.ndarray, rows_of: np.ndarray, wanted: Share) -> np.ndarray:
    """Which of the distinct positions, in ascending order, are held out: of each stratum the first, or every nth."""
    order = np.argsort(strata, kind="stable")
    sizes = np.bincount(strata)
    if wanted.fold is not None:  # counted on from stratum to stratum, so that folds are of one size
        number, folds = wanted.fold
        chosen = np.zeros(len(strata), bool)
        chosen[order] = np.arange(len(strata)) % folds == number - 1
        return chosen
    rows = np.bincount(strata, rows_of)
    if wanted.count:
        taken = _allotted(wanted.count, rows)
    else:
        last = np.array([rows_of[order][end - 1] for end in np.cumsum(sizes)])
        taken = np.clip(np.round(wanted.share * rows), 1, rows - last)  # of each stratum a row on both sides
    reached = np.cumsum(rows_of[order]) - np.repeat(np.cumsum(rows) - rows, sizes)
    chosen = np.zeros(len(strata), bool)
    chosen[order] = reached <= np.repeat(taken, sizes)
    return chosen


def _allotted(count: int, sizes: np.ndarray) -> np.ndarray:
    """A number of rows divided in proportion to sizes: the largest remainders get the rows that are left."""
    quotas = count * sizes / sizes.sum()
    parts = np.floor(quotas)
    left = int(count - parts.sum())
    parts[np.argsort(parts - quotas, kind="stable")[:left]] += 1
    return parts


def copies(row: dict[str, Any], weight: float) -> int:
    """How often a row of a source with this weight stands in an epoch: 0.5 takes half of the rows, 2.5 each 2 or 3 times."""
    whole = int(weight)
    return whole if weight == whole else whole + (position(row, "weight") < weight - whole)


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {key: _normalised(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_normalised(item) for item in value]
    return value
