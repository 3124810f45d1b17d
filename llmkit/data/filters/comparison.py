"""Filters that compare rows with each other, in two steps: a key for each row by itself, then all keys together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np


class Comparison(ABC):
    """A filter that takes out rows for what other rows say. Keys are arrays of one length and type."""

    reason: str  # why rows are taken out

    @abstractmethod
    def key(self, row: dict[str, Any]) -> np.ndarray:
        """What is compared of a row, shape (W,)."""

    @abstractmethod
    def none(self) -> np.ndarray:
        """The keys of no rows, shape (0, W)."""

    @abstractmethod
    def repeats(self, keys: Sequence[np.ndarray], alive: np.ndarray) -> np.ndarray:
        """Which earlier row each row repeats, by number over all keys, -1 for none.

        `keys` are arrays of shape (N_i, W), whose rows count on from one to the next; `alive`, of shape (sum of N_i,),
        says which are to be looked at.
        """


def first_of_equal(codes: np.ndarray) -> np.ndarray:
    """For each row of (N,) or (N, W) integers, the number of the first row that is equal to it."""
    if not len(codes):
        return np.zeros(0, np.int64)
    columns = codes.reshape(len(codes), -1)
    order = np.lexsort(columns.T[::-1])  # which is stable: of equal rows the first comes first
    ordered = columns[order]
    starts = np.ones(len(codes), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = np.empty(len(codes), np.int64)
    firsts[order] = order[np.flatnonzero(starts)][np.cumsum(starts) - 1]
    return firsts
