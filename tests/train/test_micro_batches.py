"""How a global batch is cut, shared between processes, and prepared ahead."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting import one_thread, random_corpus, tiny_model, tiny_task

from llmkit.data.batches import BatchOrder
from llmkit.data.corpus import Corpus
from llmkit.model.objective import examples_in, sizes
from llmkit.train.mesh import Mesh
from llmkit.train.micro_batches import Feeder, cut

_one_thread = pytest.fixture(autouse=True)(one_thread)


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus", 40)


def feeder(corpus: Corpus, process: int = 0, processes: int = 1, size: int | None = None, batch: int = 7) -> Feeder:
    objective = tiny_task().objective(tiny_model())
    order = BatchOrder(corpus.lengths("input_ids"), 3, batch_size=batch, by_length=False)
    return Feeder(corpus, order, objective, Mesh(process, processes), size)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, list):
            return all(map(np.array_equal, a, b))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a) for a, b in zip(one, other, strict=True)
    )


def computed(part: list[int], lengths: np.ndarray, *, padded: bool) -> int:
    own = lengths[part]
    return int(own.max() * len(own) if padded else own.sum())


@pytest.mark.parametrize("padded", [False, True])
def test_parts_have_every_example_once_and_keep_to_the_limits(padded: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, int(rng.integers(2, 200)), int(rng.integers(1, 60)))
        numbers = rng.permutation(len(lengths))[: int(rng.integers(1, len(lengths) + 1))].tolist()
        tokens = int(rng.integers(1, 400)) if rng.random() < 0.8 else None
        examples = int(rng.integers(1, 9)) if rng.random() < 0.5 else None
        parts = cut(numbers, lengths, padded=padded, tokens=tokens, examples=examples)
        assert sorted(n for part in parts for n in part) == sorted(numbers)
        for part in parts:
            assert part, "no part is empty"
            assert examples is None or len(part) <= examples
            assert tokens is None or len(part) == 1 or computed(part, lengths, padded=padded) <= tokens
            size = computed(part, lengths, padded=padded)
            assert size - lengths[part].sum() <= 0.03 * size
        if tokens is None and examples is None and not padded:
            assert len(parts) == 1
        for part, following in pairwise(parts):  # nothing is cut that could have been together
            more = [*part, following[0]]
            full = examples is not None and len(part) == examples
            size = computed(more, lengths, padded=padded)
            assert full or (tokens is not None and size > tokens) or lengths[more].sum() < 0.97 * size


def test_padded_parts_hold_examples_of_like_length() -> None:
    lengths = np.array([30, 90, 29, 88, 30, 91])
    parts = cut(range(6), lengths, padded=True, tokens=280, examples=None)
    assert [sorted(part) for part in parts] == [[1, 3, 5], [0, 2, 4]]
    assert cut(range(6), lengths, padded=True, tokens=None, examples=None) == parts, "together they would be padded"
    assert cut(range(6), lengths, padded=False, tokens=280, examples=None) == [[0, 1, 2, 3, 4], [5]]


@pytest.mark.parametrize(("short", "parts"), [(94, 1), (93, 2)])
def test_a_part_has_up_to_three_percent_padding(short: int, parts: int) -> None:
    assert len(cut(range(2), np.array([100, short]), padded=True, tokens=None)) == parts
    assert len(cut(range(2), np.array([100, short]), padded=False, tokens=None)) == 1


@pytest.mark.parametrize("tokens", [None, 40])
def test_what_is_prepared_ahead_is_what_would_be_made_now(corpus: Corpus, tokens: int | None) -> None:
    ahead = feeder(corpus)
    for step in range(15):
        assert same(ahead.take(step, tokens), feeder(corpus)._prepare(step, tokens)), step
    ahead.close()


def test_it_can_start_at_any_step_and_step_back(corpus: Corpus) -> None:
    ahead = feeder(corpus)
    for step in (9, 10, 3, 3, 4, 0, 25):
        assert same(ahead.take(step, None), feeder(corpus)._prepare(step, None))
    ahead.close()


def test_a_lower_limit_is_not_served_with_what_was_prepared_before(corpus: Corpus) -> None:
    ahead = feeder(corpus)
    ahead.take(0, None)
    assert len(ahead.take(1, 30)) > 1
    assert all(examples_in(b) == 1 or sizes(b)[1] <= 30 for b in ahead.take(2, 30))
    ahead.close()


def test_what_goes_wrong_ahead_is_raised_when_it_is_taken(corpus: Corpus) -> None:
    ahead = feeder(corpus)
    collate = type(ahead.objective).collate

    def broken(self: Any, examples: Any) -> Any:
        raise OSError("the disk is gone")

    ahead.take(0, None)
    [prepared] = ahead._ahead.values()
    prepared.result()
    type(ahead.objective).collate = broken  # type: ignore[method-assign]
    try:
        ahead.take(1, None)
        with pytest.raises(OSError, match="the disk is gone"):
            ahead.take(2, None)
    finally:
        type(ahead.objective).collate = collate  # type: ignore[method-assign]
        ahead.close()


@pytest.mark.parametrize(("batch", "processes"), [(7, 2), (8, 3), (1, 2), (2, 4)])
def test_processes_share_a_batch(corpus: Corpus, batch: int, processes: int) -> None:
    feeders = [feeder(corpus, process, processes, 1, batch) for process in range(processes)]
    for step in range(8):
        wanted = sorted(len(corpus[int(n)]["input_ids"]) for n in feeders[0].order.batch(step))
        given: list[int] = []
        for own in feeders:
            batches = own.take(step, None)
            assert batches, "every process takes part"
            if own.has_share(step):
                given += [sizes(b)[0] for b in batches]
        assert sorted(given) == wanted
    for own in feeders:
        own.close()
