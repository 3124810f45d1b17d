"""Intervals and differences of metrics, from their examples: a seeded bootstrap, and a permutation test.

Shapes: N examples, G groups of examples that are drawn together, R resamples, K sums.

Intervals are those of the bias-corrected and accelerated bootstrap (BCa: Efron, "Better Bootstrap Confidence Intervals",
1987) for functions of sums, widened for small samples as in Hesterberg, "What Teachers Should Know About the Bootstrap",
2015 (https://arxiv.org/abs/1411.5279); of log odds for areas under curves; of percentiles for others, and for differences of
shares. The test swaps the two models' predictions example by example (approximate randomisation: Noreen,
"Computer-Intensive Methods for Testing Hypotheses", 1989).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmkit.metrics.statistic import Statistic, Sums, Weighted

LEVEL = 0.95
ONE_ALONE = "one example alone has no spread"
FEWEST_GROUPS = 5  # for an interval: of means of 2, 3 and 4 normal numbers it would hold 52, 75 and 88 % of the time
Key = tuple[str, str]  # by which a caller tells its statistics: a model and a metric, say
_MOST_GROUPS = 20_000  # more are put together at random, which changes an interval by nothing that can be seen
_NUMBERS_AT_ONCE = 2_000_000
_MOST_WEIGHTS, _FEWEST = 40_000_000, 200  # in all resamples of what is no function of sums; resamples
_FEWEST_FINITE = 0.9  # of the resamples
_SAME = "all resamples give the same value, so they tell nothing of its spread"
_BIASED = "resamples overrate it, so they tell nothing of its spread"


@dataclass(frozen=True)
class Interval:
    """Of 95 %; without `low` and `high`, `why` there is none."""

    low: float | None
    high: float | None
    why: str | None = None


@dataclass(frozen=True)
class Difference:
    """Of two models on the same examples, its interval, and how likely one as large would be between equals."""

    difference: float
    low: float | None
    high: float | None
    p: float | None
    why: str | None = None


@dataclass(frozen=True)
class Bootstrap:
    """How often examples are drawn, and from which seed; `groups` says of all examples which belong together."""

    groups: np.ndarray
    seed: int
    resamples: int

    def draw(self, statistics: Mapping[Key, Statistic]) -> Resampled:
        """Resamples of some statistics; those that are made of the same examples are drawn together."""
        alike: dict[bytes, list[Key]] = {}
        for key, statistic in statistics.items():
            alike.setdefault(statistic.used.tobytes(), []).append(key)
        drawn: dict[Key, tuple[_Drawn, int]] = {}
        for keys in alike.values():
            together = _Drawn(self, [statistics[key] for key in keys])
            drawn |= {key: (together, place) for place, key in enumerate(keys)}
        return Resampled(drawn)


class Resampled:
    """Statistics and their resamples."""

    def __init__(self, drawn: Mapping[Key, tuple[_Drawn, int]]) -> None:
        self._drawn = drawn

    def interval(self, key: Key) -> Interval:
        """The interval of one."""
        together, place = self._drawn[key]
        return together.interval(place)

    def paired(self, one: Key, other: Key) -> bool:
        """True when both are there, and made of the same examples."""
        return one in self._drawn and other in self._drawn and self._drawn[one][0] is self._drawn[other][0]

    def difference(self, one: Key, other: Key) -> Difference:
        """The first less the second, which are paired."""
        together, place = self._drawn[one]
        return together.difference(place, self._drawn[other][1])

    def gap(self, one: Key, other: Resampled) -> Interval:
        """The interval of what one is here less there, where there are other examples, drawn from another seed."""
        (here, place), (there, that) = self._drawn[one], other._drawn[one]
        if why := _too_few(min(here.groups, there.groups)) or here.why_none(place) or there.why_none(that):
            return Interval(None, None, why)
        if here.same(place) or there.same(that):
            if here.is_share(place) and there.is_share(that):
                return _newcombe(here.whole[place], here.groups, there.whole[that], there.groups)
            return Interval(None, None, _SAME)
        return _percentiles(_apart(here.draws[place], there.draws[that]))


class _Drawn:
    """Resamples of statistics that are made of the same examples."""

    def __init__(self, plan: Bootstrap, statistics: Sequence[Statistic]) -> None:
        self.plan, self.statistics = plan, statistics
        used = statistics[0].used
        names, self.group_of = np.unique(plan.groups[used], return_inverse=True)
        self.groups = len(names)
        if self.groups > _MOST_GROUPS:
            order = np.random.default_rng([plan.seed, 2]).permutation(self.groups)
            self.group_of, self.groups = order[self.group_of] % _MOST_GROUPS, _MOST_GROUPS
        self.parts = [self._grouped(each) if isinstance(each, Sums) else None for each in statistics]
        self.whole = [float(each.values(np.ones((1, len(used))))[0]) for each in statistics]
        self.draws = self._draw() if self.groups > 1 else []

    def _grouped(self, statistic: Sums) -> np.ndarray:
        """Sums by group, (G, K)."""
        found = np.zeros((self.groups, statistic.parts.shape[1]))
        np.add.at(found, self.group_of, statistic.parts)
        return found

    def _enough(self, statistic: Statistic) -> int:
        """How many resamples: all, but of what takes long for many examples so many that it takes seconds."""
        if not isinstance(statistic, Weighted):
            return self.plan.resamples
        affordable = _MOST_WEIGHTS // (statistic.columns * len(statistic.used))
        return min(self.plan.resamples, max(_FEWEST, affordable))

    def _draw(self) -> list[np.ndarray]:
        """The values of each statistic, (R,)."""
        found = [np.empty(self._enough(each)) for each in self.statistics]
        random = np.random.default_rng([self.plan.seed, 0])
        for rows in self._chunks():
            count = rows.stop - rows.start
            drawn = random.integers(0, self.groups, (count, self.groups), dtype=np.int32)
            drawn += np.arange(count, dtype=np.int32)[:, None] * self.groups
            weights = np.bincount(drawn.ravel(), minlength=count * self.groups).reshape(count, self.groups)
            weights = weights.astype(np.float64)
            for values, each, parts in zip(found, self.statistics, self.parts, strict=True):
                if parts is not None and isinstance(each, Sums):
                    values[rows] = _combined(each, weights @ parts)
                elif rows.start < len(values):
                    values[rows] = each.values(weights[: len(values) - rows.start, self.group_of])
        return found

    def _chunks(self) -> Iterator[slice]:
        size = max(1, _NUMBERS_AT_ONCE // max(self.groups, len(self.group_of)))
        for start in range(0, self.plan.resamples, size):
            yield slice(start, min(start + size, self.plan.resamples))

    def interval(self, place: int) -> Interval:
        """The interval of one statistic."""
        if self.groups < 2:
            return Interval(None, None, ONE_ALONE)
        draws, whole = self.draws[place], self.whole[place]
        if self.same(place):
            return Interval(*_wilson(whole, self.groups)) if self.is_share(place) else Interval(None, None, _SAME)
        if why := self.why_none(place) or _too_few(self.groups):
            return Interval(None, None, why)
        statistic, without = self.statistics[place], self._without_one(place)
        if isinstance(statistic, Weighted) and statistic.odds:
            return _by_odds(draws, whole, self.groups)
        return _around(whole, _bca(draws, whole, without) if without is not None else _percentiles(draws))

    def same(self, place: int) -> bool:
        """True when all resamples give the value of the examples themselves."""
        return _all_the_same(self.draws[place], self.whole[place])

    def is_share(self, place: int) -> bool:
        """True for a share of examples that are right."""
        statistic = self.statistics[place]
        return isinstance(statistic, Sums) and statistic.share

    def why_none(self, place: int) -> str | None:
        """Why resamples of a statistic give no interval, whatever they are; None where they do."""
        statistic = self.statistics[place]
        return _BIASED if isinstance(statistic, Sums) and statistic.biased else None

    def difference(self, place: int, other: int) -> Difference:
        """One statistic less another."""
        whole = self.whole[place] - self.whole[other]
        if self.groups < 2:
            return Difference(whole, None, None, None, ONE_ALONE)
        draws = _apart(self.draws[place], self.draws[other])
        p = self._p(place, other, draws, whole)
        if _all_the_same(draws, whole) and not whole:
            return Difference(whole, whole, whole, p)
        why = _too_few(self.groups) or self.why_none(place) or (_SAME if _all_the_same(draws, whole) else None)
        if why:
            return Difference(whole, None, None, p, why)
        one, two = self._without_one(place), self._without_one(other)
        shares = self.is_share(place) and self.is_share(other)  # whose few values percentiles cover better
        by_sums = one is not None and two is not None and not shares
        count = self.groups if shares else None
        found = _around(whole, _bca(draws, whole, one - two) if by_sums else _percentiles(draws, count))  # type: ignore[operator]
        return Difference(whole, found.low, found.high, p, found.why)

    def _without_one(self, place: int) -> np.ndarray | None:
        """The statistic without each group in turn, (G,); None for what is no function of sums."""
        statistic, parts = self.statistics[place], self.parts[place]
        if parts is None or not isinstance(statistic, Sums):
            return None
        return _combined(statistic, parts.sum(axis=0) - parts)

    def _p(self, place: int, other: int, draws: np.ndarray, whole: float) -> float | None:
        """Two-sided: by permutation for functions of sums, else from the resamples."""
        ours, theirs = self.statistics[place], self.statistics[other]
        mine, others = self.parts[place], self.parts[other]
        if mine is None or others is None or not isinstance(ours, Sums) or not isinstance(theirs, Sums):
            finite = draws[np.isfinite(draws)]
            if not len(finite):
                return None
            tail = min(np.count_nonzero(finite <= 0), np.count_nonzero(finite >= 0))
            return float(min(1.0, 2 * (tail + 1) / (len(finite) + 1)))
        random = np.random.default_rng([self.plan.seed, 1])
        swap, reached = others - mine, 0
        total, rest = mine.sum(axis=0), others.sum(axis=0)
        for rows in self._chunks():
            coins = random.integers(0, 2, (rows.stop - rows.start, self.groups), dtype=np.int8).astype(np.float64)
            moved = coins @ swap
            found = _combined(ours, total + moved) - _combined(theirs, rest - moved)
            reached += int(np.count_nonzero(np.abs(found) >= abs(whole) * (1 - 1e-9)))
        return (reached + 1) / (self.plan.resamples + 1)


def _too_few(groups: int) -> str | None:
    """Why so many examples, or documents, give no interval."""
    if groups < 2:
        return ONE_ALONE
    return f"{groups} examples are too few" if groups < FEWEST_GROUPS else None


def _combined(statistic: Sums, sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return statistic.combine(sums)


def _apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The differences of as many resamples as both have."""
    count = min(len(one), len(other))
    found: np.ndarray = one[:count] - other[:count]
    return found


def _all_the_same(draws: np.ndarray, whole: float) -> bool:
    """True when resamples differ by rounding alone."""
    finite = draws[np.isfinite(draws)]
    return bool(len(finite)) and float(np.ptp(finite)) <= 1e-12 * max(1.0, abs(whole))


def _bca(draws: np.ndarray, whole: float, without: np.ndarray) -> Interval:
    from scipy.special import ndtr, ndtri

    finite, jackknife = draws[np.isfinite(draws)], without[np.isfinite(without)]
    if len(finite) < _FEWEST_FINITE * len(draws):
        return Interval(None, None, "too many resamples have no value")
    below = (np.count_nonzero(finite < whole) + np.count_nonzero(finite <= whole)) / (2 * len(finite))
    if not 0 < below < 1:
        return _percentiles(draws)
    bias = ndtri(below)
    apart = jackknife.mean() - jackknife
    spread = (apart**2).sum() ** 1.5
    acceleration = (apart**3).sum() / (6 * spread) if spread > 0 else 0.0
    places = []
    for z in _ends(len(without)):
        moved = bias + z
        slope = 1 - acceleration * moved
        places.append(float(ndtr(bias + moved / slope)) if slope > 0 else (0.0 if z < 0 else 1.0))
    low, high = np.quantile(finite, places)
    return Interval(float(low), float(high))


def _around(whole: float, found: Interval) -> Interval:
    """An interval, where it holds the value that it is of."""
    slack = 1e-9 * max(1.0, abs(whole))
    if found.low is None or found.high is None or found.low - slack <= whole <= found.high + slack:
        return found
    return Interval(None, None, "the resamples do not lie around the value of the examples themselves")


def _ends(count: int) -> tuple[float, float]:
    """Where an interval ends, in standard normal deviations: further out for a small sample."""
    from scipy.stats import t

    reach = float(t.ppf((1 + LEVEL) / 2, count - 1)) * math.sqrt(count / (count - 1))
    return -reach, reach


def _percentiles(draws: np.ndarray, count: int | None = None) -> Interval:
    """Of resamples; of so many examples, widened for small samples."""
    from scipy.special import ndtr

    finite = draws[np.isfinite(draws)]
    if len(finite) < _FEWEST_FINITE * len(draws):
        return Interval(None, None, "too many resamples have no value")
    places = [(1 - LEVEL) / 2, (1 + LEVEL) / 2] if count is None else ndtr(_ends(count))
    low, high = np.quantile(finite, places)
    return Interval(float(low), float(high))


def _by_odds(draws: np.ndarray, whole: float, count: int) -> Interval:
    """Of a number between 0 and 1 whose log odds are about normally distributed, such as an area under a ROC curve.

    Percentiles of such areas are too narrow where one class is rare (Pepe, "The Statistical Evaluation of Medical Tests for
    Classification and Prediction", 2003).
    """
    from scipy.special import expit, logit

    finite = draws[np.isfinite(draws)]
    if len(finite) < _FEWEST_FINITE * len(draws):
        return Interval(None, None, "too many resamples have no value")
    least = 1 / (2 * count)
    odds, middle = logit(np.clip(finite, least, 1 - least)), logit(np.clip(whole, least, 1 - least))
    low, high = (float(expit(middle + z * odds.std(ddof=1))) for z in _ends(count))
    return _around(whole, Interval(low, high))


def _newcombe(one: float, count: int, other: float, count_of_other: int) -> Interval:
    """Of the difference of two independent shares (Newcombe, 1998, his tenth method)."""
    (low, high), (low_of_other, high_of_other) = _wilson(one, count), _wilson(other, count_of_other)
    apart = one - other
    return Interval(
        apart - math.hypot(one - low, high_of_other - other), apart + math.hypot(high - one, other - low_of_other)
    )


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Of a share; for one of all or none of the examples, where a bootstrap sees no spread (Wilson, 1927)."""
    z2 = 1.959963984540054**2
    below = 1 + z2 / count
    middle = (share + z2 / (2 * count)) / below
    half = math.sqrt(share * (1 - share) * z2 / count + z2**2 / (4 * count**2)) / below
    return 0.0 if share == 0 else middle - half, 1.0 if share == 1 else middle + half
