"""Schedules: pure functions from the progress of a training to a multiplier of the learning rate.

During warm-up the multiplier rises by equal amounts from `1 / warmup_steps` at step 0 to 1 (linear warm-up: Goyal et
al., 2017, https://arxiv.org/abs/1706.02677). Every schedule but `plateau` is 1 at `step == warmup_steps` and changes
over the steps that remain. `floor` is the share of the peak below which the rate does not go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

from llmkit.optim.options import Fraction, NotNegative, Positive, PositiveCount, PositiveFraction
from llmkit.recipe.fields import ShareOrCount
from llmkit.recipe.values import count_of, share


def _some(value: str | int) -> str | int:
    if value == 0 or (isinstance(value, str) and share(value) == 0):
        raise ValueError("should be a share above 0% such as `30%` or a whole number above 0")
    return value


SomeSteps = Annotated[ShareOrCount, AfterValidator(_some)]


@dataclass(frozen=True)
class Progress:
    """Where a training stands: `step` is the 0-based index of the step about to be taken.

    `held_out` has every held-out loss so far, oldest first.
    """

    step: int
    total_steps: int
    warmup_steps: int
    held_out: tuple[float, ...] = ()

    @property
    def warmup(self) -> float:
        """The multiplier of warm-up; 1 after it."""
        return (self.step + 1) / self.warmup_steps if self.step < self.warmup_steps else 1.0

    @property
    def steps_since_warmup(self) -> int:
        """0 during warm-up."""
        return max(0, self.step - self.warmup_steps)

    @property
    def steps_after_warmup(self) -> int:
        """How many there are; a total within the warm-up counts as one step."""
        return max(1, self.total_steps - self.warmup_steps)

    @property
    def done(self) -> float:
        """The share of the steps after warm-up that is done, in [0, 1]."""
        return min(1.0, self.steps_since_warmup / self.steps_after_warmup)


def constant(progress: Progress) -> float:
    """Warm-up, then 1."""
    return progress.warmup


def linear(progress: Progress) -> float:
    """Warm-up, then a straight line that meets 0 at `step == total_steps`."""
    return progress.warmup * (1.0 - progress.done)


def cosine(progress: Progress, *, floor: Fraction = 0.0) -> float:
    """Warm-up, then half a cosine that meets `floor` at `step == total_steps`.

    Loshchilov and Hutter, 2016, without restarts: https://arxiv.org/abs/1608.03983.
    """
    return progress.warmup * _above(floor, 0.5 * (1.0 + math.cos(math.pi * progress.done)))


def polynomial(progress: Progress, *, power: Positive = 2.0, floor: Fraction = 0.0) -> float:
    """Warm-up, then the share of steps that remains to the `power`; meets `floor` at `step == total_steps`."""
    return progress.warmup * _above(floor, (1.0 - progress.done) ** power)


def exponential(progress: Progress, *, floor: PositiveFraction = 0.01) -> float:
    """Warm-up, then the same factor each step, such that `floor` is met at `step == total_steps`."""
    return float(progress.warmup * floor**progress.done)


def step(progress: Progress, *, every: SomeSteps = "30%", factor: PositiveFraction = 0.1) -> float:
    """Warm-up, then multiplied by `factor` each time that `every` has passed: a number of steps, or a share of those left.

    He et al., 2015, divide by ten in this way: https://arxiv.org/abs/1512.03385.
    """
    length = max(1, count_of(every, progress.steps_after_warmup))
    return float(progress.warmup * factor ** (progress.steps_since_warmup // length))


def inverse_sqrt(progress: Progress, *, timescale: PositiveCount | None = None) -> float:
    """Warm-up, then `sqrt(timescale / (timescale + steps since warm-up))`.

    `timescale` is in steps: those of the warm-up when absent, as in Vaswani et al., 2017 (https://arxiv.org/abs/1706.03762),
    or 10,000 without warm-up.
    """
    scale = timescale or progress.warmup_steps or 10_000
    return progress.warmup * math.sqrt(scale / (scale + progress.steps_since_warmup))


def wsd(
    progress: Progress,
    *,
    decay: ShareOrCount = "20%",
    shape: Literal["linear", "1-sqrt"] = "1-sqrt",
    floor: Fraction = 0.0,
) -> float:
    """Warm-up, stable, decay: 1 until the last `decay` steps (or share of all steps), which fall to `floor`.

    With x from 0 to 1 over these, they fall as 1 - x or 1 - sqrt(x). Hu et al., 2024: https://arxiv.org/abs/2404.06395;
    1 - sqrt: Hägele et al., 2024, https://arxiv.org/abs/2405.18392.
    """
    length = min(count_of(decay, progress.total_steps), progress.steps_after_warmup)
    into = progress.steps_since_warmup - (progress.steps_after_warmup - length)
    x = min(1.0, max(0, into) / length) if length else 0.0
    return progress.warmup * _above(floor, 1.0 - (math.sqrt(x) if shape == "1-sqrt" else x))


def plateau(
    progress: Progress,
    *,
    factor: PositiveFraction = 0.5,
    patience: PositiveCount = 2,
    min_delta: NotNegative = 0.0,
    floor: Fraction = 0.0,
) -> float:
    """Warm-up, then multiplied by `factor` after each `patience` evaluations in a row without a better held-out loss.

    A loss is better when it is lower than the best by more than `min_delta`, as for early stopping.
    """
    rate, best, without_gain = 1.0, math.inf, 0
    for loss in progress.held_out:
        if loss < best - min_delta:
            best, without_gain = loss, 0
            continue
        without_gain += 1
        if without_gain == patience:
            rate, without_gain = max(floor, rate * factor), 0
    return progress.warmup * rate


def _above(floor: float, share: float) -> float:
    return floor + (1.0 - floor) * share
