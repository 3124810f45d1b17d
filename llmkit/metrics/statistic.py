"""What a metric is: a number that is made of examples, each of which may count more than once.

Shapes: N examples, K sums, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np


class NoValueError(ValueError):
    """A metric has no value on these predictions; the text says why."""


class Statistic(Protocol):
    """A number made of N examples."""

    @property
    def used(self) -> np.ndarray:
        """The numbers of the examples that it is made of, ascending, shape (N,)."""

    def values(self, weights: np.ndarray) -> np.ndarray:
        """The number, where each example counts so often: (R, N) to (R,). NaN where such examples give none."""


@dataclass(frozen=True)
class Sums:
    """A function of sums over examples, `parts` (N, K); with `share` it is a share of examples that are right.

    One that is `biased` is larger for resamples than for the examples themselves, so that they tell nothing of its spread.
    """

    used: np.ndarray
    parts: np.ndarray
    combine: Callable[[np.ndarray], np.ndarray]  # (..., K) to (...)
    share: bool = False
    biased: bool = False

    def values(self, weights: np.ndarray) -> np.ndarray:
        """As the protocol says."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return self.combine(weights @ self.parts)


@dataclass(frozen=True)
class Weighted:
    """A number that is no function of sums: of ranks, say, or the user's own. It takes time for each of its `columns`.

    One that is `odds` lies between 0 and 1, and its log odds are spread more evenly than it is.
    """

    used: np.ndarray
    compute: Callable[[np.ndarray], np.ndarray]  # (R, N) to (R,)
    columns: int = 1
    odds: bool = False

    def values(self, weights: np.ndarray) -> np.ndarray:
        """As the protocol says."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.compute(weights)


def value_of(statistic: Statistic) -> float:
    """The number over all its examples. Raises NoValueError where that is none that is finite."""
    if not len(statistic.used):
        raise NoValueError("there are no examples")
    found = float(statistic.values(np.ones((1, len(statistic.used))))[0])
    if not np.isfinite(found):
        raise NoValueError(f"it is not a finite number ({found})")
    return found


@dataclass(frozen=True)
class Predictions:
    """What a model said of N examples: fields (arrays, or lists with None where there is nothing), and their labels.

    `groups` (N,) are numbers of what the examples were cut from: windows of one document are drawn together.
    """

    fields: Mapping[str, Any]
    groups: np.ndarray
    labels: tuple[str, ...] = ()
    seed: int = 0

    def __len__(self) -> int:
        return len(self.groups)

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def take(self, numbers: np.ndarray) -> Predictions:
        """The predictions of some examples, as ones of their own."""
        chosen = {
            name: found[numbers] if isinstance(found, np.ndarray) else [found[number] for number in numbers]
            for name, found in self.fields.items()
        }
        return replace(self, fields=chosen, groups=self.groups[numbers])

    def everything(self) -> np.ndarray:
        """The numbers of all examples."""
        return np.arange(len(self))

    def known(self, name: str) -> np.ndarray:
        """The numbers of the examples that have a value in a field."""
        return np.array([number for number, value in enumerate(self[name]) if value is not None], np.int64)


@dataclass(frozen=True)
class Metric:
    """A metric by name: the fields of predictions that it needs, and how it is made of them.

    `make` raises NoValueError, with the reason, where the predictions give no value.
    """

    needs: tuple[str, ...]
    make: Callable[[Predictions], Statistic]
    lower_is_better: bool = False

    def __call__(self, predictions: Predictions) -> Statistic:
        """The statistic of these predictions."""
        if not len(predictions):
            raise NoValueError("there are no examples")
        return self.make(predictions)


def mean_of(used: np.ndarray, values: np.ndarray, *, share: bool = False) -> Sums:
    """The mean of a value for each example, (N,)."""
    return ratio_of(used, values, np.ones(len(used)), share=share)


def ratio_of(
    used: np.ndarray,
    above: np.ndarray,
    below: np.ndarray,
    then: Callable[[np.ndarray], np.ndarray] = lambda found: found,
    *,
    share: bool = False,
) -> Sums:
    """A function of the ratio of two sums over examples, each (N,)."""
    parts = np.stack([np.asarray(above, np.float64), np.asarray(below, np.float64)], axis=1)
    return Sums(used, parts, lambda sums: then(sums[..., 0] / sums[..., 1]), share)
