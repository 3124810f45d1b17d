"""Schedules are pure functions from a step to a multiplier in [0, 1]."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest

from llmkit import catalog
from llmkit.optim.schedules import constant, cosine, linear

Schedule = Callable[[int, int, int], float]
ALL = [constant, linear, cosine]


@pytest.mark.parametrize("schedule", ALL)
def test_warmup_rises_by_equal_amounts_to_one(schedule: Schedule) -> None:
    values = [schedule(step, 100, 4) for step in range(5)]
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("schedule", ALL)
def test_without_warmup_the_first_step_has_the_whole_rate(schedule: Schedule) -> None:
    assert schedule(0, 10, 0) == 1.0


def test_values_after_warmup() -> None:
    assert constant(99, 100, 10) == 1.0
    assert linear(55, 100, 10) == pytest.approx(0.5)
    assert linear(99, 100, 10) == pytest.approx(1 / 90)
    assert cosine(55, 100, 10) == pytest.approx(0.5)
    assert cosine(25, 100, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 6)))


@pytest.mark.parametrize("schedule", [linear, cosine])
def test_decays_steadily_to_zero(schedule: Schedule) -> None:
    values = [schedule(step, 50, 5) for step in range(5, 51)]
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    assert values[-2] > 0
    assert values[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize(("total", "warmup"), [(0, 0), (1, 0), (1, 1), (3, 3), (3, 10), (7, 2)])
def test_every_value_is_in_range_for_any_lengths(schedule: Schedule, total: int, warmup: int) -> None:
    values = [schedule(step, total, warmup) for step in range(total + 3)]
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values[0] > 0
    assert schedule(warmup, total, warmup) == 1.0


def test_the_catalogue_names_them() -> None:
    assert [catalog.resolve("schedule", name) for name in catalog.names("schedule")] == ALL
