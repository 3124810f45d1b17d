"""Which packed segments go together, and who sees whom, against the rule written out token by token."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from llmkit.model import segments
from llmkit.model.segments import Seen, groups

CPU = torch.device("cpu")
TOGETHER = segments._TOGETHER


def slow(lengths: tuple[int, ...], before: int, shared: bool, window: int | None) -> list[list[bool]]:
    """By query and key; a token is (example, place in it), and what all examples begin with has example -1."""
    tokens = [(-1, place) for place in range(before)]
    for example, length in enumerate(lengths):
        if shared and example == 0:
            tokens += [(-1, place) for place in range(length)]
        else:
            begins = before or (lengths[0] if shared else 0)
            tokens += [(example, begins + place) for place in range(length)]
    return [[_looks(*query, *key, window) for key in tokens] for query in tokens[before:]]


def _looks(example: int, place: int, other: int, earlier: int, window: int | None) -> bool:
    within = other in (example, -1) and earlier <= place
    return within and (window is None or place - earlier < window)


def layouts(count: int, most: int, longest: int) -> list[Seen]:
    """Random ones of some segments, with nothing, a shared one, or keys without queries before them."""
    draw, found = random.Random(0), []
    for number in range(count):
        lengths = tuple(draw.randint(1, longest) for _ in range(draw.randint(1, most)))
        before, shared = [(0, False), (draw.randint(1, 2 * longest), False), (0, True)][number % 3]
        window = draw.choice([None, 1, 2, draw.randint(1, longest), draw.randint(1, 5 * longest)])
        found.append(Seen(lengths, before, shared, window))
    return found


def check(seen: Seen, dtype: torch.dtype = torch.float32) -> None:
    bias = seen.bias(dtype, CPU)
    looks = torch.tensor(slow(seen.lengths, seen.before, seen.shared, seen.window))
    assert bias.shape == (sum(seen.lengths), seen.before + sum(seen.lengths))
    assert bias.dtype == dtype
    assert torch.equal(bias == 0, looks), seen
    assert torch.equal(bias == float("-inf"), ~looks), seen
    assert looks.any(dim=1).all(), "softmax of nothing is not a number"


def test_who_sees_whom_is_as_the_rule_says() -> None:
    for seen in layouts(300, most=5, longest=6):
        check(seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_any_type_of_numbers(dtype: torch.dtype) -> None:
    """The masks that are kept are told apart by it."""
    for seen in layouts(9, most=3, longest=4):
        check(seen)
        check(seen, dtype)


@pytest.mark.parametrize(
    "seen",
    [
        Seen((1100,)),
        Seen((500, 300, 300), window=450),
        Seen((700, 4, 400), shared=True, window=600),
        Seen((3, 20), before=1020, window=1000),
        Seen((3, 1), before=1021),
    ],
)
def test_long_ones_that_are_not_kept(seen: Seen) -> None:
    check(seen)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [(0, 4), (4, 0, 2), (3, 0)])
def test_segments_without_tokens_take_no_room(lengths: tuple[int, ...], window: int | None) -> None:
    check(Seen(lengths, window=window))
    check(Seen(lengths, before=5, window=window))
    check(Seen(lengths, shared=True, window=window))


@pytest.mark.parametrize(("before", "shared"), [(0, False), (7, False), (0, True)])
def test_a_window_that_reaches_everywhere_is_none(before: int, shared: bool) -> None:
    with_window = Seen((4, 9, 2), before, shared, window=16).bias(torch.float32, CPU)
    assert torch.equal(with_window, Seen((4, 9, 2), before, shared).bias(torch.float32, CPU))
    shorter = Seen((4, 9, 2), before, shared, window=3).bias(torch.float32, CPU)
    assert not torch.equal(with_window, shorter)


def test_keys_before_are_a_shared_segment_without_its_queries() -> None:
    for seen in layouts(60, most=4, longest=6):
        if seen.before:
            whole = Seen((seen.before, *seen.lengths), shared=True, window=seen.window).bias(torch.float32, CPU)
            assert torch.equal(seen.bias(torch.float32, CPU), whole[seen.before :])


def test_plainly_causal_is_where_the_rule_is_a_triangle() -> None:
    for seen in [*layouts(300, most=2, longest=6), Seen((1,)), Seen((1,), window=1), Seen((5,), shared=True)]:
        looks = torch.tensor(slow(seen.lengths, seen.before, seen.shared, seen.window))
        square = looks.shape[0] == looks.shape[1]
        triangle = square and torch.equal(looks, torch.ones_like(looks).tril())
        if len(seen.lengths) == 1:
            assert seen.plainly_causal == triangle, seen
        assert triangle or not seen.plainly_causal, seen


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        (Seen((5,)), True),
        (Seen((5,), window=5), True),
        (Seen((5,), window=4), False),
        (Seen((5,), shared=True), True),
        (Seen((5,), before=1), False),
        (Seen((5, 1)), False),
    ],
)
def test_plainly_causal(seen: Seen, expected: bool) -> None:
    assert seen.plainly_causal == expected


@pytest.mark.parametrize("length", [31, 1031])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad])
def test_what_was_made_in_inference_can_be_trained_with(context: Callable[[], torch.no_grad], length: int) -> None:
    """The next one to ask for it may train."""
    seen = Seen((length, 2), window=17)
    with context():
        seen.bias(torch.float32, CPU)
    scores = torch.randn(length + 2, length + 2, requires_grad=True)
    bias = seen.bias(torch.float32, CPU)
    assert not bias.is_inference()
    (scores + bias).softmax(-1).square().sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_it_is_where_it_is_asked_for() -> None:
    seen = Seen((3, 4), before=2)
    check(seen)
    assert seen.bias(torch.float32, torch.device("meta")).is_meta
    check(seen)


@pytest.mark.parametrize("longest", [3, 40, 400, 900])
def test_groups_cover_all_segments_in_order(longest: int) -> None:
    draw = random.Random(longest)
    for _ in range(100):
        lengths = tuple(draw.randint(1, longest) for _ in range(draw.randint(1, 60)))
        found = list(groups(lengths))
        ends = [last for _, last in found]
        assert found == list(zip([0, *ends], ends, strict=False))
        assert ends[-1] == len(lengths)
        sizes = [sum(lengths[first:last]) for first, last in found]
        assert all(first < last for first, last in found)
        assert all(size <= TOGETHER or last - first == 1 for size, (first, last) in zip(sizes, found, strict=True))
        for size, (begin, _) in zip(sizes, found[1:], strict=False):
            assert size + lengths[begin] > TOGETHER, "one more would have gone with it"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((1,), [(0, 1)]),
        ((TOGETHER + 1,), [(0, 1)]),
        ((TOGETHER - 1, 1), [(0, 2)]),
        ((TOGETHER - 1, 2), [(0, 1), (1, 2)]),
        ((1, TOGETHER, 1), [(0, 1), (1, 2), (2, 3)]),
        ((1, 3 * TOGETHER, 1, 1), [(0, 1), (1, 2), (2, 4)]),
    ],
)
def test_groups(lengths: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert TOGETHER <= 512
    assert list(groups(lengths)) == expected
