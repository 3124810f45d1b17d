"""Where examples are too few for an interval that holds what it says, there is none."""

from __future__ import annotations

import numpy as np
import pytest

from llmkit.metrics.bootstrap import FEWEST_GROUPS, Bootstrap, Resampled
from llmkit.metrics.statistic import mean_of

KEY, OTHER = ("model", "x"), ("parent", "x")


def drawn(*each: list[float], share: bool = False) -> Resampled:
    count = len(each[0])
    statistics = {
        key: mean_of(np.arange(count), np.array(values), share=share)
        for key, values in zip((KEY, OTHER), each, strict=False)
    }
    return Bootstrap(np.arange(count), 1, 200).draw(statistics)


@pytest.mark.parametrize("count", range(2, FEWEST_GROUPS))
def test_too_few_examples(count: int) -> None:
    found = drawn([float(n) for n in range(count)], [n * 2 + 1.0 for n in range(count)])
    interval, difference = found.interval(KEY), found.difference(OTHER, KEY)
    assert (interval.low, interval.high, interval.why) == (None, None, f"{count} examples are too few")
    assert (difference.low, difference.high) == (None, None)
    assert difference.difference == pytest.approx((count + 1) / 2)
    assert difference.p is not None
    assert found.gap(KEY, found).why == f"{count} examples are too few"


def test_two_models_that_differ_by_the_same_in_two_examples() -> None:
    found = drawn([1.0, 2.0], [2.0, 3.0]).difference(KEY, OTHER)
    assert (found.difference, found.low) == (-1.0, None)
    same = drawn([1.0, 2.0], [1.0, 2.0]).difference(KEY, OTHER)
    assert (same.difference, same.low, same.high) == (0.0, 0.0, 0.0)


def test_enough_examples_and_shares_of_all_or_none() -> None:
    assert drawn([float(n) for n in range(FEWEST_GROUPS)]).interval(KEY).low is not None
    assert drawn([0.0, 0.0], share=True).interval(KEY).high == pytest.approx(0.658, abs=1e-3)
