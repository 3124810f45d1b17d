"""The order of the data is a function of the seed and the step, and wastes little on padding."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.data.batches import BatchOrder, by_length


def lengths_of(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(5, 500, count)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 8), (7, 3), (8, 4), (100, 8), (1000, 7), (300, 1), (5, 5)])
def test_every_example_once_an_epoch_and_only_the_last_batch_is_smaller(count: int, size: int) -> None:
    order = BatchOrder(lengths_of(count), size, seed=1)
    for epoch in range(3):
        batches = [order.batch(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(count))
        assert all(len(batch) == size for batch in batches[:-1])
        assert len(batches[-1]) == (count - 1) % size + 1


def test_a_step_means_the_same_batch_whatever_was_asked_before() -> None:
    lengths = lengths_of(203)
    order = BatchOrder(lengths, 8, seed=5)
    steps = 4 * order.steps_per_epoch
    in_order = [order.batch(step).tolist() for step in range(steps)]
    again = BatchOrder(lengths, 8, seed=5)
    for step in np.random.default_rng(0).permutation(steps):
        assert again.batch(int(step)).tolist() == in_order[step]
    assert BatchOrder(lengths, 8, seed=5).batch(steps - 1).tolist() == in_order[-1]


def test_another_seed_and_another_epoch_give_another_order() -> None:
    lengths = lengths_of(203)
    order = BatchOrder(lengths, 8, seed=5)
    epoch = order.steps_per_epoch
    first = [order.batch(step).tolist() for step in range(epoch)]
    assert first != [order.batch(epoch + step).tolist() for step in range(epoch)]
    other = BatchOrder(lengths, 8, seed=6)
    assert first != [other.batch(step).tolist() for step in range(epoch)]


def test_the_order_does_not_depend_on_the_global_random_state() -> None:
    np.random.seed(1)
    before = BatchOrder(lengths_of(50), 4, seed=5).batch(3).tolist()
    np.random.seed(2)
    assert BatchOrder(lengths_of(50), 4, seed=5).batch(3).tolist() == before


def test_little_is_padding_and_batches_do_not_come_sorted() -> None:
    lengths = lengths_of(4000)
    order = BatchOrder(lengths, 8, seed=5)
    batches = [order.batch(step) for step in range(order.steps_per_epoch)]
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert lengths.sum() / padded > 0.95
    random = np.random.default_rng(0).permutation(4000).reshape(-1, 8)
    assert lengths.sum() / sum(8 * lengths[batch].max() for batch in random) < 0.7, "what it is held against"
    widths = [int(lengths[batch].max()) for batch in batches]
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.15


def test_by_length_has_all_once_longest_first() -> None:
    lengths = lengths_of(50)
    batches = by_length(lengths, 8)
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    order = np.concatenate(batches)
    assert sorted(order.tolist()) == list(range(50))
    assert (np.diff(lengths[order]) <= 0).all()
    assert by_length(np.zeros(0, int), 8) == []
