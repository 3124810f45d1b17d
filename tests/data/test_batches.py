"""The order of the data is a function of the seed and the step, and wastes little on padding."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.data.batches import BatchOrder, by_length
from llmkit.errors import RecipeError


def lengths_of(count: int) -> np.ndarray:
    return np.random.default_rng(3).integers(5, 500, count)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 8), (7, 3), (8, 4), (100, 8), (1000, 7), (300, 1), (5, 5)])
def test_every_example_once_an_epoch_and_only_the_last_batch_is_smaller(count: int, size: int) -> None:
    order = BatchOrder(lengths_of(count), 1, batch_size=size, by_length=True)
    for epoch in range(3):
        batches = [order.batch(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]
        assert sorted(np.concatenate(batches).tolist()) == list(range(count))
        assert all(len(batch) == size for batch in batches[:-1])
        assert len(batches[-1]) == (count - 1) % size + 1


def test_a_step_means_the_same_batch_whatever_was_asked_before() -> None:
    lengths = lengths_of(203)
    order = BatchOrder(lengths, 5, batch_size=8, by_length=True)
    steps = 4 * order.steps_per_epoch
    in_order = [order.batch(step).tolist() for step in range(steps)]
    again = BatchOrder(lengths, 5, batch_size=8, by_length=True)
    for step in np.random.default_rng(0).permutation(steps):
        assert again.batch(int(step)).tolist() == in_order[step]
    assert BatchOrder(lengths, 5, batch_size=8, by_length=True).batch(steps - 1).tolist() == in_order[-1]


def test_another_seed_and_another_epoch_give_another_order() -> None:
    lengths = lengths_of(203)
    order = BatchOrder(lengths, 5, batch_size=8, by_length=True)
    epoch = order.steps_per_epoch
    first = [order.batch(step).tolist() for step in range(epoch)]
    assert first != [order.batch(epoch + step).tolist() for step in range(epoch)]
    other = BatchOrder(lengths, 6, batch_size=8, by_length=True)
    assert first != [other.batch(step).tolist() for step in range(epoch)]


def test_the_order_does_not_depend_on_the_global_random_state() -> None:
    np.random.seed(1)
    before = BatchOrder(lengths_of(50), 5, batch_size=4, by_length=True).batch(3).tolist()
    np.random.seed(2)
    assert BatchOrder(lengths_of(50), 5, batch_size=4, by_length=True).batch(3).tolist() == before


def test_little_is_padding_and_batches_do_not_come_sorted() -> None:
    lengths = lengths_of(4000)
    order = BatchOrder(lengths, 5, batch_size=8, by_length=True)
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


SHAPES = {
    "uniform": lambda rng, n: rng.integers(5, 500, n),
    "many short, few long": lambda rng, n: np.minimum(rng.lognormal(4, 1.2, n).astype(int) + 2, 2048),
    "two sizes": lambda rng, n: rng.choice([3, 512], n),
    "all alike": lambda rng, n: np.full(n, 128),
    "full windows and a rest": lambda rng, n: np.where(rng.random(n) < 0.8, 1024, rng.integers(2, 1024, n)),
    "ever longer": lambda rng, n: np.arange(1, n + 1),
}


def epoch_of(order: BatchOrder, epoch: int = 0) -> list[np.ndarray]:
    return [order.batch(epoch * order.steps_per_epoch + step) for step in range(order.steps_per_epoch)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_length", [False, True])
def test_batches_of_so_many_tokens_have_every_example_once_and_are_never_empty(shape: str, by_length: bool) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        lengths = SHAPES[shape](rng, int(rng.integers(1, 700)))
        longest = int(lengths.max())
        for batch_tokens in (longest, longest + 1, int(longest * rng.uniform(1, 9)), int(lengths.sum()), 10**9):
            order = BatchOrder(lengths, seed, batch_tokens=batch_tokens, by_length=by_length)
            batches = epoch_of(order, seed % 3)
            assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
            assert all(len(batch) for batch in batches)
            tokens = np.array([lengths[batch].sum() for batch in batches])
            share = lengths.sum() / len(batches)
            assert (abs(tokens - share) <= longest).all(), "no batch is further off than its examples are long"
            if batch_tokens <= lengths.sum():
                assert batch_tokens <= share < batch_tokens * (1 + 1 / len(batches))


def test_batches_are_near_the_tokens_that_were_asked_for() -> None:
    lengths = SHAPES["many short, few long"](np.random.default_rng(0), 20_000)
    for like_lengths in (False, True):
        order = BatchOrder(lengths, 1, batch_tokens=16_384, by_length=like_lengths)
        tokens = np.array([lengths[batch].sum() for batch in epoch_of(order)])
        assert tokens.mean() == pytest.approx(16_384, rel=0.02)
        assert tokens.std() < 0.04 * 16_384


def test_batches_of_tokens_are_a_function_of_the_seed_and_the_step() -> None:
    lengths = lengths_of(203)
    order = BatchOrder(lengths, 5, batch_tokens=2000, by_length=True)
    in_order = [order.batch(step).tolist() for step in range(3 * order.steps_per_epoch)]
    again = BatchOrder(lengths, 5, batch_tokens=2000, by_length=True)
    for step in np.random.default_rng(0).permutation(len(in_order)):
        assert again.batch(int(step)).tolist() == in_order[step]
    other = BatchOrder(lengths, 6, batch_tokens=2000, by_length=True)
    assert [other.batch(step).tolist() for step in range(3)] != in_order[:3]


def test_an_example_longer_than_a_batch_is_named() -> None:
    lengths = np.array([5, 9, 12, 3])
    assert BatchOrder(lengths, 1, batch_tokens=12, by_length=False).steps_per_epoch == 2
    with pytest.raises(RecipeError, match="more tokens than a batch") as caught:
        BatchOrder(lengths, 1, batch_tokens=11, by_length=False)
    assert "example 2" in str(caught.value.got)
    assert caught.value.exit_code == 2


def test_packed_batches_are_not_sorted() -> None:
    lengths = lengths_of(2000)
    batches = epoch_of(BatchOrder(lengths, 5, batch_size=8, by_length=False))
    spread = np.mean([lengths[batch].std() for batch in batches])
    assert spread > 0.8 * lengths.std()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("target", [{"batch_size": 16}, {"batch_tokens": 16_384}])
def test_padded_batches_are_under_three_percent_padding(shape: str, target: dict[str, int]) -> None:
    """As they are computed: in micro-batches of examples of like length."""
    from llmkit.train.micro_batches import cut

    lengths = SHAPES[shape](np.random.default_rng(1), 8000)
    if max(target.values()) > 100:
        lengths = lengths[lengths <= 2048]
    batches = epoch_of(BatchOrder(lengths, 5, by_length=True, **target))
    parts = [part for batch in batches for part in cut(batch, lengths, padded=True, tokens=None, examples=None)]
    computed = [len(part) * int(lengths[part].max()) for part in parts]
    assert 1 - lengths.sum() / sum(computed) < 0.03
    assert max(computed) < 2 * max(lengths[batch].sum() for batch in batches), "no batch takes far more memory"
