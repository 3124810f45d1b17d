"""Errors and correlations of predicted numbers: fields `target` and `predicted`, each (N,)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from llmkit.metrics.ranking import spearman
from llmkit.metrics.statistic import Metric, NoValueError, Predictions, Sums, Weighted, mean_of


def _error(predictions: Predictions) -> np.ndarray:
    found: np.ndarray = predictions["predicted"] - predictions["target"]
    return found


def _mae(predictions: Predictions) -> Sums:
    return mean_of(predictions.everything(), np.abs(_error(predictions)))


def _rmse(predictions: Predictions) -> Sums:
    parts = np.stack([_error(predictions) ** 2, np.ones(len(predictions))], axis=1)
    return Sums(predictions.everything(), parts, lambda sums: np.sqrt(sums[..., 0] / sums[..., 1]))


def _moments(predictions: Predictions, combine: Callable[[np.ndarray], np.ndarray]) -> Sums:
    """Sums of one, x, y, x², y², xy and (y - x)²; both are moved to a mean of 0, which keeps them exact."""
    x, y = predictions["predicted"], predictions["target"]
    if len(y) < 2 or np.ptp(y) == 0:
        raise NoValueError("all targets are the same: there is nothing to explain")
    middle = y.mean()
    x, y = x - middle, y - middle
    parts = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y, (y - x) ** 2], axis=1)
    return Sums(predictions.everything(), parts, combine)


def _r2(predictions: Predictions) -> Sums:
    return _moments(predictions, lambda s: 1 - s[..., 6] / (s[..., 4] - s[..., 2] ** 2 / s[..., 0]))


def _pearson(predictions: Predictions) -> Sums:
    _refuse_constant(predictions)

    def combine(s: np.ndarray) -> np.ndarray:
        n, x, y = s[..., 0], s[..., 1], s[..., 2]
        both, one, other = s[..., 5] - x * y / n, s[..., 3] - x**2 / n, s[..., 4] - y**2 / n
        found: np.ndarray = both / np.sqrt(one * other)
        return found

    return _moments(predictions, combine)


def _spearman(predictions: Predictions) -> Weighted:
    _refuse_constant(predictions)
    return Weighted(predictions.everything(), spearman(predictions["predicted"], predictions["target"]))


def _refuse_constant(predictions: Predictions) -> None:
    for name, what in (("predicted", "predictions"), ("target", "targets")):
        if np.ptp(predictions[name]) == 0:
            raise NoValueError(f"all {what} are the same: there is nothing to correlate")


_NEEDS = ("target", "predicted")
MAE = Metric(_NEEDS, _mae, lower_is_better=True)
RMSE = Metric(_NEEDS, _rmse, lower_is_better=True)
R2 = Metric(_NEEDS, _r2)
PEARSON = Metric(_NEEDS, _pearson)
SPEARMAN = Metric(_NEEDS, _spearman)
