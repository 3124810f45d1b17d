"""Which examples make up each step: a pure function of the seed, so that training can resume at any step."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from llmkit.errors import RecipeError

_POOL = 64  # batches that are sorted by length together


class BatchOrder:
    """The global batches of a training: `batch(step)` gives the numbers of the examples, shape (B,).

    Each epoch visits every example once, in a new order, in batches of `batch_size` examples, the last of which may be
    smaller, or of about `batch_tokens` tokens. With `by_length`, which is for batches that are padded, a shuffled epoch
    is cut into pools of 64 batches, each pool is sorted by length and cut into batches, and the batches are shuffled.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        seed: int,
        *,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        by_length: bool,
    ) -> None:
        """Raises RecipeError when an example has more than `batch_tokens`."""
        self.lengths = np.asarray(lengths)
        self.seed = seed
        self._by_length = by_length
        self._batch_tokens = batch_tokens
        longest = int(self.lengths.max())
        if batch_tokens is not None and longest > batch_tokens:
            raise RecipeError(
                "an example has more tokens than a batch",
                got=f"{longest} tokens in example {int(self.lengths.argmax())}, batch_tokens {batch_tokens}",
                expected=f"batch_tokens of {longest} or more",
                hint="raise batch_tokens, or lower data.max_length",
                where="batch_tokens",
            )
        if batch_tokens is None:
            assert batch_size is not None, "one of the two is given"
            self.batch_size: float = batch_size
            self.steps_per_epoch = math.ceil(len(self.lengths) / batch_size)
        else:
            self.steps_per_epoch = max(1, int(self.lengths.sum()) // batch_tokens)
            self.batch_size = len(self.lengths) / self.steps_per_epoch  # on average
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def batch(self, step: int) -> np.ndarray:
        """The examples of a 0-based step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[index]

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        if self._by_length:
            pool = round(_POOL * self.batch_size)
            parts = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = np.concatenate([part[np.argsort(self.lengths[part], kind="stable")] for part in parts])
        batches = self._cut(order)
        if not self._by_length:
            return batches
        full = len(batches) if self._batch_tokens or len(order) % self.batch_size == 0 else len(batches) - 1
        return [batches[i] for i in rng.permutation(full)] + batches[full:]

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        if self._batch_tokens is None:
            size = int(self.batch_size)
            return [order[start : start + size] for start in range(0, len(order), size)]
        # An example belongs to the batch in whose equal share of all tokens its middle lies. A share is never less than
        # the longest example, so no batch is empty.
        middles = np.cumsum(self.lengths[order]) - self.lengths[order] / 2
        batch_of = (middles * self.steps_per_epoch / self.lengths.sum()).astype(np.int64)
        return np.split(order, np.searchsorted(batch_of, np.arange(1, self.steps_per_epoch)))


def by_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """All examples once, longest first, in batches: for evaluation, where order does not matter."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
