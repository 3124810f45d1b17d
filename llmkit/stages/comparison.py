"""Scores with intervals, and what sets models apart, from their predictions of the same examples."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.metrics.bootstrap import Bootstrap, Resampled
from llmkit.metrics.statistic import Predictions
from llmkit.tasks.scoring import statistics_of

Values = dict[str, dict[str, Any]]  # by model and metric


@dataclass
class Comparison:
    """The scores of some models on some examples, as results.json has them."""

    examples: int
    values: Values
    intervals: Values = field(default_factory=dict)
    differences: Values = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    scored: dict[str, int] = field(default_factory=dict)  # by metric, of how many examples, where not of all
    resampled: Resampled | None = None

    def json(self) -> dict[str, Any]:
        """JSON values, for a part of the data or for data of their own."""
        found: dict[str, Any] = {"examples": self.examples, **self.values, "intervals": self.intervals}
        return found | self.rest()

    def rest(self) -> dict[str, Any]:
        """What there need not be."""
        parts = {"differences": self.differences, "reasons": self.reasons, "scored": self.scored}
        return {name: part for name, part in parts.items() if part}


@dataclass(frozen=True)
class Comparing:
    """How models are compared: by which metrics, and how often and from which seed examples are drawn."""

    metrics: Sequence[str]
    resamples: int
    seed: int
    part: bool = False  # of examples that were compared as a whole before

    def __call__(self, predictions: Mapping[str, Predictions], name: str) -> Comparison:
        """The scores of each model, the first of which is held against the others; `name` is of the data."""
        first = next(iter(predictions))
        made = {who: statistics_of(self.metrics, each, part=self.part) for who, each in predictions.items()}
        found = Comparison(len(predictions[first]), {who: values for who, (_, values, _) in made.items()})
        found.reasons = {who: dict(reasons) for who, (_, _, reasons) in made.items() if reasons}
        used = {key: len(each.used) for key, each in made[first][0].items()}
        found.scored = {key: count for key, count in used.items() if count < found.examples}
        if self.resamples:
            statistics = {(who, key): each for who, (some, _, _) in made.items() for key, each in some.items()}
            seed = self.seed + zlib.crc32(name.encode())  # data sets are drawn independently of each other
            found.resampled = Bootstrap(predictions[first].groups, seed, self.resamples).draw(statistics)
            _spread(found, found.resampled, first)
        return found


def _spread(found: Comparison, resampled: Resampled, first: str) -> None:
    """Intervals, and differences between the first model and each other one."""
    for who, values in found.values.items():
        found.intervals[who] = {}
        for metric in values:
            interval = resampled.interval((who, metric))
            if interval.low is None:
                found.reasons.setdefault(who, {})[metric] = f"no interval: {interval.why}"
            else:
                found.intervals[who][metric] = [interval.low, interval.high]
        if who == first:
            continue
        found.differences[who] = {}
        for metric in values:
            if resampled.paired((first, metric), (who, metric)):
                difference = resampled.difference((first, metric), (who, metric))
                said = {"difference": difference.difference, "low": difference.low, "high": difference.high}
                why = {} if difference.why is None else {"why": difference.why}
                found.differences[who][metric] = said | {"p": difference.p} | why


def gaps(comparisons: Mapping[str, Comparison], start: str, end: str, kind: str) -> list[dict[str, Any]]:
    """How much higher each metric is on one data set than on another, for each model that is scored on both."""
    one, two = comparisons[start], comparisons[end]
    found = []
    for who in one.values:
        for metric, value in one.values[who].items():
            other = two.values.get(who, {}).get(metric)
            if other is None:
                continue
            entry = {"kind": kind, "metric": metric, "from": start, "to": end, "who": who, "gap": other - value}
            if one.resampled is not None and two.resampled is not None:
                spread = two.resampled.gap((who, metric), one.resampled)
                entry |= {"low": spread.low, "high": spread.high}
                entry |= {} if spread.why is None else {"why": spread.why}
            found.append(entry | {"from_value": value, "to_value": other})
    return found
