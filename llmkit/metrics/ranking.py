"""Scores that depend on order alone, of examples that count more than once. Shapes: N examples, R resamples, C curves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_Compute = Callable[[np.ndarray], np.ndarray]


def area_under_curves(positive: np.ndarray, scores: np.ndarray) -> _Compute:
    """The mean area under the ROC curves of C columns: a function of weights, (R, N) to (R,).

    `positive` and `scores` are (N, C). A tie counts half (Hanley and McNeil, 1982). A column whose examples are all
    positive or all negative in a resample is left out of its mean; NaN where none is left.
    """
    columns = [_ordered(scores[:, number]) for number in range(scores.shape[1])]

    def compute(weights: np.ndarray) -> np.ndarray:
        areas = []
        for number, (order, starts) in enumerate(columns):
            sorted_weights, yes = weights[:, order], positive[order, number]
            above = np.add.reduceat(sorted_weights * yes, starts, axis=1)
            below = np.add.reduceat(sorted_weights * ~yes, starts, axis=1)
            lower = np.cumsum(below, axis=1) - below
            areas.append((above * (lower + below / 2)).sum(axis=1) / (above.sum(axis=1) * below.sum(axis=1)))
        found = np.stack(areas)
        counted = np.isfinite(found)
        return np.where(counted, found, 0.0).sum(axis=0) / counted.sum(axis=0)

    return compute


def spearman(first: np.ndarray, second: np.ndarray) -> _Compute:
    """The correlation of ranks, ties having their middle rank: a function of weights, (R, N) to (R,)."""
    orders = [_ordered(first), _ordered(second)]

    def compute(weights: np.ndarray) -> np.ndarray:
        ranks = [_weighted_ranks(weights, *order) for order in orders]
        total = weights.sum(axis=1, keepdims=True)
        apart = [rank - (weights * rank).sum(axis=1, keepdims=True) / total for rank in ranks]
        both, one, other = (
            (weights * left * right).sum(axis=1)
            for left, right in ((apart[0], apart[1]), (apart[0], apart[0]), (apart[1], apart[1]))
        )
        found: np.ndarray = both / np.sqrt(one * other)
        return found

    return compute


def _ordered(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ascending order of values, and where each run of equal ones starts in it."""
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    return order, np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))


def _weighted_ranks(weights: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The middle rank of each example, (R, N), where each stands as often as its weight says."""
    tied = np.add.reduceat(weights[:, order], starts, axis=1)
    middle = np.cumsum(tied, axis=1) - tied / 2
    ranks = np.empty(weights.shape)
    ranks[:, order] = np.repeat(middle, np.diff(starts, append=len(order)), axis=1)
    return ranks
