"""Which examples make up each step: a pure function of the seed, so that training can resume at any step."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_POOL = 32  # batches that are sorted by length together


class BatchOrder:
    """The global batches of a training: `batch(step)` gives the numbers of the examples, shape (B,).

    Each epoch visits every example once. Examples of like length are put together: a shuffled epoch is cut into pools
    of 32 batches, each pool is sorted by length and cut into batches, and the batches are shuffled. The last batch of
    an epoch may be smaller.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = math.ceil(len(self.lengths) / batch_size)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, step: int) -> np.ndarray:
        """The examples of a 0-based step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        full: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        pool = _POOL * self.batch_size
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            for first in range(0, len(part), self.batch_size):
                batch = part[first : first + self.batch_size]
                (full if len(batch) == self.batch_size else rest).append(batch)
        return [full[i] for i in rng.permutation(len(full))] + rest


def by_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All examples once, longest first, in batches: for evaluation, where order does not matter."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
