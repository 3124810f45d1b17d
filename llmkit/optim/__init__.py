"""Optimizers and schedules: what a recipe's `optimizer:` and `schedule:` stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from llmkit import catalog
from llmkit.errors import RecipeError
from llmkit.optim.options import checked_options
from llmkit.optim.schedules import Progress

if TYPE_CHECKING:
    import torch


def build_optimizer(
    name: str, groups: Iterable[Mapping[str, Any]], *, lr: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer that the catalogue has under `name`, with the recipe's options.

    `groups` keep their own `lr`, `weight_decay` and any further keys (`names`, `group`, `hidden`). All wrong options are
    reported at once. Raises RecipeError for an unknown name or option, a value of the wrong type or out of range, and
    a package that is not installed.
    """
    build = catalog.resolve("optimizer", name, where="optimizer")
    checked = checked_options("optimizer", name, build, options)
    try:
        return build(groups, lr=lr, **checked)
    except ValueError as error:
        raise RecipeError(f"`{name}` refuses its options", got=str(error), where="optimizer") from None


def build_schedule(name: str, options: Mapping[str, Any]) -> Callable[[Progress], float]:
    """The schedule that the catalogue has under `name`, with the recipe's options: from progress to a share of the peak.

    All wrong options are reported at once. Raises RecipeError as `build_optimizer` does.
    """
    schedule = catalog.resolve("schedule", name, where="schedule")
    return partial(schedule, **checked_options("schedule", name, schedule, options))
