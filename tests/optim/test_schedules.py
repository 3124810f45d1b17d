"""Schedules are pure functions from the progress of a training to a multiplier in [0, 1]."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from llmkit import catalog
from llmkit.errors import RecipeError
from llmkit.optim import build_schedule
from llmkit.optim.schedules import Progress

ALL = catalog.names("schedule")
DECAYING = ["linear", "cosine", "polynomial"]
WITH_FLOOR = ["cosine", "polynomial", "exponential", "wsd", "plateau"]


def curve(name: str, steps: range, total: int, warmup: int, **options: Any) -> list[float]:
    schedule = build_schedule(name, options)
    return [schedule(Progress(step, total, warmup)) for step in steps]


@pytest.mark.parametrize("name", ALL)
def test_warmup_rises_by_equal_amounts_to_one(name: str) -> None:
    assert curve(name, range(5), 100, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize("name", ALL)
def test_without_warmup_the_first_step_has_the_whole_rate(name: str) -> None:
    assert curve(name, range(1), 10, 0) == [1.0]


def test_values_after_warmup() -> None:
    def at(step: int, name: str, **options: Any) -> float:
        return build_schedule(name, options)(Progress(step, 100, 10))

    assert at(99, "constant") == 1.0
    assert at(55, "linear") == pytest.approx(0.5)
    assert at(99, "linear") == pytest.approx(1 / 90)
    assert at(55, "cosine") == pytest.approx(0.5)
    assert at(25, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 6)))
    assert at(25, "cosine", floor=0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 6)))
    assert at(40, "polynomial") == pytest.approx((2 / 3) ** 2)
    assert at(40, "polynomial", power=3, floor=0.5) == pytest.approx(0.5 + 0.5 * (2 / 3) ** 3)
    assert at(55, "exponential", floor=0.25) == pytest.approx(0.5)
    assert at(40, "exponential") == pytest.approx(0.01 ** (1 / 3))
    assert at(40, "inverse_sqrt") == pytest.approx(math.sqrt(10 / 40)), "as in Attention Is All You Need"
    assert at(40, "inverse_sqrt", timescale=90) == pytest.approx(math.sqrt(90 / 120))


@pytest.mark.parametrize("name", DECAYING)
def test_decays_steadily_to_zero(name: str) -> None:
    values = curve(name, range(5, 51), 50, 5)
    assert all(later < earlier for earlier, later in itertools.pairwise(values))
    assert values[-2] > 0
    assert values[-1] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in WITH_FLOOR if name != "plateau"])
def test_the_floor_is_met_at_the_end_and_not_before(name: str) -> None:
    values = curve(name, range(60), 50, 5, floor=0.2)
    assert min(values[5:50]) > 0.2
    assert values[50:] == pytest.approx([0.2] * 10)


def test_exponential_falls_by_the_same_factor_each_step() -> None:
    values = curve("exponential", range(5, 51), 50, 5)
    ratios = [later / earlier for earlier, later in itertools.pairwise(values)]
    assert ratios == pytest.approx([0.01 ** (1 / 45)] * 45)


def test_a_polynomial_of_the_first_power_is_linear() -> None:
    assert curve("polynomial", range(50), 50, 5, power=1) == pytest.approx(curve("linear", range(50), 50, 5))


@pytest.mark.parametrize(("every", "length"), [("30%", 27), ("100%", 90), (7, 7), (200, 200), ("0.1%", 1)])
def test_step_divides_each_time_that_its_length_has_passed(every: str | int, length: int) -> None:
    values = curve("step", range(10, 100), 100, 10, every=every, factor=0.5)
    assert values == [0.5 ** (number // length) for number in range(90)]


def test_step_is_the_one_of_pytorch() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.StepLR(optimizer, step_size=8, gamma=0.1)
    expected = []
    for _ in range(40):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert curve("step", range(40), 40, 0, every=8) == pytest.approx(expected)


@pytest.mark.parametrize(("timescale", "warmup"), [(None, 5), (30, 5), (None, 0)])
def test_inverse_sqrt_is_the_one_of_transformers(timescale: int | None, warmup: int) -> None:
    from transformers import get_inverse_sqrt_schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_inverse_sqrt_schedule(optimizer, warmup, timescale=timescale).lr_lambdas[0]
    mine = curve("inverse_sqrt", range(warmup, 60), 60, warmup, timescale=timescale)
    assert mine == pytest.approx([theirs(step) for step in range(warmup, 60)])


@pytest.mark.parametrize(("decay", "length"), [("20%", 20), (30, 30), ("0%", 0), (500, 90), ("100%", 90)])
@pytest.mark.parametrize(("shape", "falls"), [("linear", lambda x: 1 - x), ("1-sqrt", lambda x: 1 - math.sqrt(x))])
def test_wsd_is_stable_and_then_decays(
    decay: str | int, length: int, shape: str, falls: Callable[[float], float]
) -> None:
    """`decay` counts in all steps, and is cut to those after warm-up."""
    values = curve("wsd", range(10, 101), 100, 10, decay=decay, shape=shape)
    assert values[: 90 - length] == [1.0] * (90 - length)
    assert values[90 - length :] == pytest.approx([falls(n / length) if length else 1.0 for n in range(length + 1)])


def test_wsd_as_it_is_written_in_a_recipe() -> None:
    assert curve("wsd", range(100), 100, 10) == curve("wsd", range(100), 100, 10, decay="20%", shape="1-sqrt", floor=0)


LOSSES = [3.0, 2.0, 2.0, 2.5, 1.9, 1.95, 1.85, 1.9, 1.9, 1.9, 1.9]
PLATEAUS: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]),
    ({"patience": 1, "factor": 0.1}, [1, 1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]),
    ({"patience": 3}, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0.5, 0.5]),
    ({"min_delta": 0.12}, [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.0625]),
    ({"patience": 1, "factor": 0.5, "floor": 0.2}, [1, 1, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]),
]


@pytest.mark.parametrize(("options", "expected"), PLATEAUS)
def test_plateau_lowers_the_rate_when_the_held_out_loss_stops_falling(
    options: dict[str, Any], expected: list[float]
) -> None:
    schedule = build_schedule("plateau", options)
    found = [schedule(Progress(50, 100, 10, tuple(LOSSES[:count]))) for count in range(1, len(LOSSES) + 1)]
    assert found == pytest.approx(expected)
    assert schedule(Progress(50, 100, 10)) == 1.0, "before the first evaluation"
    assert schedule(Progress(4, 100, 10, tuple(LOSSES))) == pytest.approx(0.5 * expected[-1]), "in the warm-up too"


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_plateau_is_the_one_of_pytorch(patience: int) -> None:
    """PyTorch's patience is one less: it counts the evaluations that are let pass."""
    generator = torch.Generator().manual_seed(5)
    losses = torch.rand(80, generator=generator).tolist()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience - 1, threshold=0.02, threshold_mode="abs", min_lr=1e-3, eps=0.0
    )
    schedule = build_schedule("plateau", {"patience": patience, "min_delta": 0.02, "floor": 1e-3})
    for count, loss in enumerate(losses, 1):
        theirs.step(loss)
        assert schedule(Progress(5, 100, 0, tuple(losses[:count]))) == pytest.approx(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("total", "warmup"), [(0, 0), (1, 0), (1, 1), (3, 3), (3, 10), (7, 2)])
def test_every_value_is_in_range_for_any_lengths(name: str, total: int, warmup: int) -> None:
    values = curve(name, range(total + 3), total, warmup)
    assert all(0.0 <= value <= 1.0 for value in values)
    assert values[0] > 0
    assert curve(name, range(warmup, warmup + 1), total, warmup) == [1.0]


def test_progress_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Progress(1, 2, 0).step = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "options", "where", "expected", "hint"),
    [
        ("cosin", {}, "schedule", "one of constant, linear", "`cosine`"),
        ("linear", {"floor": 0.1}, "schedule.floor", "no option", None),
        ("cosine", {"flor": 0.1}, "schedule.flor", "one of floor", "`floor`"),
        ("cosine", {"warmup": "3%"}, "schedule.warmup", "one of floor", "`warmup:` beside `schedule:`"),
        ("cosine", {"floor": 1.5}, "schedule.floor", "a number up to 1", None),
        ("cosine", {"floor": float("nan")}, "schedule.floor", "a number", None),
        ("cosine", {"floor": "10%"}, "schedule.floor", "a number", None),
        ("cosine", {"floor": True}, "schedule.floor", "a number", None),
        ("exponential", {"floor": 0}, "schedule.floor", "a number above 0", None),
        ("polynomial", {"power": 0}, "schedule.power", "a number above 0", None),
        ("step", {"every": "half"}, "schedule.every", "a share such as", None),
        ("step", {"every": 0}, "schedule.every", "a share above 0%", None),
        ("step", {"every": "0%"}, "schedule.every", "a share above 0%", None),
        ("step", {"factor": 0}, "schedule.factor", "a number above 0", None),
        ("inverse_sqrt", {"timescale": 0}, "schedule.timescale", "a number above 0", None),
        ("wsd", {"decay": 0.2}, "schedule.decay", "a share such as", None),
        ("wsd", {"decay": "120%"}, "schedule.decay", "from 0% to 100%", None),
        ("wsd", {"shape": "sqrt"}, "schedule.shape", "`linear` or `1-sqrt`", "`1-sqrt`"),
        ("plateau", {"patience": 0}, "schedule.patience", "a number above 0", None),
        ("plateau", {"patience": 1.5}, "schedule.patience", "a whole number", None),
        ("plateau", {"min_delta": -1}, "schedule.min_delta", "a number from 0 up", None),
    ],
)
def test_wrong_options_are_recipe_errors(
    name: str, options: dict[str, Any], where: str, expected: str, hint: str | None
) -> None:
    with pytest.raises(RecipeError) as caught:
        build_schedule(name, options)
    assert caught.value.where == where
    assert expected in (caught.value.expected or "")
    assert (hint or "") in (caught.value.hint or "")
    assert bool(caught.value.hint) is bool(hint)


def test_all_wrong_options_are_reported_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        build_schedule("wsd", {"decay": "lots", "shap": "linear", "floor": 2})
    assert [problem.where for problem in caught.value.problems] == ["schedule.decay", "schedule.shap", "schedule.floor"]
