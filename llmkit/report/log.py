"""A run's metrics.jsonl as curves, of any length in bounded memory."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SERIES = ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_bytes")
BUCKETS = 500  # of a curve: each with its lowest and highest value, so twice as many points
_CHUNK_BYTES = 1 << 22
_EVENTS = 200  # that are kept word for word
_COUNT, _STEPS, _SUM, _LOW, _HIGH = range(5)


@dataclass(frozen=True)
class Points:
    """A curve to draw: for each bucket of neighbouring steps its middle, mean, lowest and highest value, shape (B,)."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def is_thinned(self) -> bool:
        """True when a bucket holds more than one value."""
        return bool(np.any(self.low != self.high))


class Curve:
    """Values by step; neighbours are put together when there are too many, no extreme is lost."""

    def __init__(self, buckets: int = BUCKETS) -> None:
        self.count = 0
        self.first: tuple[int, float] = (0, math.nan)
        self.last: tuple[int, float] = (0, math.nan)
        self.lowest: tuple[int, float] = (0, math.inf)
        self.highest: tuple[int, float] = (0, -math.inf)
        self._buckets = buckets
        self._rows = np.empty((0, 5))

    def add(self, steps: np.ndarray, values: np.ndarray) -> None:
        """Takes in more values, (N,) each; those that are not finite are left out."""
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        if not len(steps):
            return
        if not self.count:
            self.first = (int(steps[0]), float(values[0]))
        self.count += len(steps)
        self.last = (int(steps[-1]), float(values[-1]))
        low, high = int(values.argmin()), int(values.argmax())
        if values[low] < self.lowest[1]:
            self.lowest = (int(steps[low]), float(values[low]))
        if values[high] > self.highest[1]:
            self.highest = (int(steps[high]), float(values[high]))
        fresh = np.stack([np.ones(len(steps)), steps, values, values, values], axis=1)
        self._rows = np.concatenate([self._rows, fresh])
        if len(self._rows) > 16 * self._buckets:
            self._rows = _together(self._rows, 4 * self._buckets)

    def points(self, buckets: int | None = None) -> Points:
        """The curve in at most so many buckets."""
        wanted = buckets or self._buckets
        rows = _together(self._rows, wanted) if len(self._rows) > wanted else self._rows
        rows = rows[np.argsort(rows[:, _STEPS] / rows[:, _COUNT], kind="stable")]
        counts = rows[:, _COUNT]
        return Points(rows[:, _STEPS] / counts, rows[:, _SUM] / counts, rows[:, _LOW], rows[:, _HIGH])


@dataclass
class TrainingLog:
    """Curves by stage and name, and the events: `skipped`, `rolled back`, `spike` and others."""

    curves: dict[str, dict[str, Curve]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)  # the first of them
    event_counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by stage and kind
    unreadable: int = 0  # lines

    def curve(self, stage: str, name: str) -> Curve | None:
        """None when nothing of that name was logged."""
        return self.curves.get(stage, {}).get(name)


def read_log(path: Path) -> TrainingLog:
    """Reads a metrics.jsonl, which may be growing; a line that is no JSON object is counted and passed over."""
    found = TrainingLog()
    if not path.is_file():
        return found
    with path.open("rb") as file:
        while lines := file.readlines(_CHUNK_BYTES):
            _take(found, list(_objects(lines, found)))
    return found


def _objects(lines: list[bytes], found: TrainingLog) -> Iterator[dict[str, Any]]:
    try:
        parsed = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        parsed = [_object(line) for line in lines if line.strip()]
    for item in parsed:
        if isinstance(item, dict) and isinstance(item.get("stage"), str) and isinstance(item.get("step"), int):
            yield item
        else:
            found.unreadable += 1


def _object(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _take(found: TrainingLog, objects: list[dict[str, Any]]) -> None:
    by_stage: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for item in objects:
        if "event" in item:
            found.event_counts[item["stage"], str(item["event"])] += 1
            if len(found.events) < _EVENTS:
                found.events.append(item)
        else:
            by_stage[item["stage"]].append(item)
    for stage, items in by_stage.items():
        curves = found.curves.setdefault(stage, {})
        for name in SERIES:
            pairs = [(item["step"], item[name]) for item in items if isinstance(item.get(name), int | float)]
            if pairs:
                table = np.array(pairs, np.float64)
                curves.setdefault(name, Curve()).add(table[:, 0], table[:, 1])


def _together(rows: np.ndarray, buckets: int) -> np.ndarray:
    """Rows put together by equal shares of the range of steps."""
    steps = rows[:, _STEPS] / rows[:, _COUNT]
    order = np.argsort(steps, kind="stable")
    rows, steps = rows[order], steps[order]
    span = max(steps[-1] - steps[0], 1e-9)
    number = np.minimum(((steps - steps[0]) / span * buckets).astype(np.int64), buckets - 1)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1])
    sums = np.add.reduceat(rows[:, : _SUM + 1], starts, axis=0)
    low, high = np.minimum.reduceat(rows[:, _LOW], starts), np.maximum.reduceat(rows[:, _HIGH], starts)
    return np.column_stack([sums, low, high])
