"""A metric of the user's own, `path.py:function`.

The function takes two lists of the same length, references and predictions: texts (answers, labels), or numbers for a task
that predicts numbers. It returns one number, or a list with a number for each example, whose mean is then the score.

    def first_word(references, predictions):
        return [r.split()[:1] == p.split()[:1] for r, p in zip(references, predictions)]

An interval needs the value of many resamples: a list costs one call in all, a number one call for each resample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llmkit.errors import DataError
from llmkit.metrics.statistic import Metric, NoValueError, Predictions, Statistic, Weighted, mean_of


class Called(Protocol):
    """The user's function, whose failures are told with file and line."""

    def __call__(self, *inputs: Any) -> Any:
        """What it returns."""

    def wrong(self, got: str, expected: str) -> Exception:
        """The error for what it should not have returned."""


def own_metric(function: Called) -> Metric:
    """The user's function as a metric."""
    return Metric(("reference", "answer"), lambda predictions: _statistic(function, predictions))


def _statistic(function: Called, predictions: Predictions) -> Statistic:
    used = [number for number in predictions.known("answer").tolist() if predictions["reference"][number] is not None]
    if not used:
        raise NoValueError("no answer was written (evaluate.generate), or none has a reference")
    references = [predictions["reference"][number] for number in used]
    answers = [predictions["answer"][number] for number in used]
    first = function(references, answers)
    if _is_number(first):
        return Weighted(np.array(used), lambda weights: _resampled(function, references, answers, weights))
    values = _each(function, first, len(used))
    return mean_of(np.array(used), values)


def _each(function: Called, found: Any, count: int) -> np.ndarray:
    """One number for each example."""
    expected = f"a number, or a list of {count} numbers"
    if not isinstance(found, list | tuple | np.ndarray):
        raise function.wrong(f"a value of type {type(found).__name__}", expected)
    if len(found) != count:
        raise function.wrong(f"{len(found)} values", expected)
    if not all(_is_number(value) for value in found):
        raise function.wrong("a list with something else than numbers", expected)
    values = np.array([float(value) for value in found])
    if not np.isfinite(values).all():
        raise function.wrong("a value that is not finite", expected)
    return values


def _resampled(function: Called, references: Sequence[Any], answers: Sequence[Any], weights: np.ndarray) -> np.ndarray:
    found = []
    for row in weights.astype(int):
        chosen = np.repeat(np.arange(len(references)), row).tolist()
        try:
            value = function([references[number] for number in chosen], [answers[number] for number in chosen])
        except DataError:  # it has a value for the examples themselves, and none for these
            value = math.nan
        found.append(float(value) if _is_number(value) else math.nan)
    return np.array(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating | np.bool_)
