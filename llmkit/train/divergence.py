"""Divergence, seen at the step where it happens: a loss or gradient that is not finite, or a loss far out of its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llmkit.data.corpus import Example
from llmkit.errors import DivergedError
from llmkit.files import write_json
from llmkit.model.objective import Objective, to_device
from llmkit.model.precision import autocast
from llmkit.recipe.training import Divergence
from llmkit.train.masters import Masters
from llmkit.train.state import TrainState

_FEWEST = 16  # losses before one can be out of their row
_NOISE = 0.1  # nats that the losses of small batches differ by anyway
_MOST_WRITTEN = 64  # examples of a batch
_TO_NORMAL = 1.4826  # times the median absolute deviation is the standard deviation of a normal distribution

CONSEQUENCE = {
    "warn": "training goes on",
    "skip": "its batch is left out",
    "rollback": "training goes back to the newest checkpoint, and on with the data after this batch",
    "stop": "training stops",
}


@dataclass(frozen=True)
class Trouble:
    """What is wrong with a step, and what the recipe says of that: warn, skip, rollback or stop."""

    why: str
    action: str


class Watch:
    """Judges each step's loss and gradient before the weights change.

    `state` gives the losses so far and how often a step was refused; so the same steps are refused after a resume.
    """

    def __init__(self, rules: Divergence, state: Callable[[], TrainState]) -> None:
        self.rules = rules
        self._state = state

    @property
    def rolls_back(self) -> bool:
        """True when a checkpoint to go back to may be needed."""
        return "rollback" in (self.rules.nan, self.rules.spike)

    def judge(self, loss: float, grad_norm: float) -> Trouble | None:
        """None when all is well. Every process of a training comes to the same answer."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._limited(
                f"the loss or its gradient is not a finite number: loss {loss:.4g}, gradient norm {grad_norm:.4g}",
                self.rules.nan,
            )
        losses = self._state().recent_losses
        if self.rules.spike == "off" or len(losses) < _FEWEST:
            return None
        score = robust_z(loss, losses)
        if score <= self.rules.spike_z:
            return None
        typical = f"the median of the {len(losses)} before is {median(losses):.4g}"
        return self._limited(f"the loss spikes: {loss:.4g}, {typical}, robust z-score {score:.1f}", self.rules.spike)

    def note(self, loss: float) -> None:
        """Takes in the loss of a step that was taken."""
        losses = self._state().recent_losses
        losses.append(loss)
        del losses[: -self.rules.window]

    def _limited(self, why: str, action: str) -> Trouble:
        """Past the limit it is no use to go on."""
        refused = self._state().refused_steps
        if action in ("skip", "rollback") and refused >= self.rules.limit:
            return Trouble(f"{why} (after {refused} steps that were refused, the limit)", "stop")
        return Trouble(why, action)


def robust_z(value: float, losses: Sequence[float]) -> float:
    """How many standard deviations a value is above the median of losses, judged by their median absolute deviation.

    Iglewicz and Hoaglin, "How to Detect and Handle Outliers", 1993. A row of nearly equal losses counts as noisier than it
    is: by 0.1 nats.
    """
    middle = median(losses)
    spread = median(abs(loss - middle) for loss in losses)
    return (value - middle) / max(_TO_NORMAL * spread, _NOISE)


def diverged(why: str, file: Path) -> DivergedError:
    """The error of a training that ends because of a step whose examples are in a file."""
    return DivergedError(
        "training diverged",
        got=why,
        hint="look at the examples in the file; lower the learning rate, use precision: fp32, or set divergence: "
        "{nan: skip, spike: skip}",
        where=file,
    )


@torch.no_grad()
def write_out(
    file: Path,
    about: dict[str, Any],
    examples: Sequence[tuple[int, Example]],
    losses: Sequence[float],
    describe: Callable[[Example], dict[str, Any]],
) -> None:
    """Writes the examples of a step that diverged, the first of them with their own losses, for study."""
    lines = (
        {"example": number, "loss": loss if math.isfinite(loss) else str(loss)} | describe(example)
        for (number, example), loss in zip(examples, losses, strict=False)
    )
    found = sorted(lines, key=lambda line: (isinstance(line["loss"], float), -float(line["loss"])))
    file.parent.mkdir(exist_ok=True)
    write_json(file, about | {"examples": found, "left_out": len(examples) - len(losses)})


@torch.no_grad()
def losses_of(
    examples: Sequence[tuple[int, Example]], masters: Masters, objective: Objective, precision: str
) -> list[float]:
    """The mean loss of each of the first examples of a step, in nats."""
    masters.model.eval()
    device, found = masters.model.device, []
    with masters.computing(objective), autocast(device, precision):
        for _, example in examples[:_MOST_WRITTEN]:
            batch = to_device(objective.collate([example]), device)
            loss = masters.call(objective.loss, batch)
            total, count = masters.over_pieces(torch.stack([loss, loss.new_tensor(objective.count(batch))])).tolist()
            found.append(total / max(count, 1))
    return found
