"""What a training stage has decided before it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmkit.data.corpus import Corpus
from llmkit.model.adapters import AdapterRules
from llmkit.recipe.schema import Freeze, Recipe
from llmkit.recipe.training import Training
from llmkit.run.directory import Run
from llmkit.tasks.base import Task


@dataclass(frozen=True)
class TrainingJob:
    """One training stage's work."""

    stage: str
    recipe: Recipe
    run: Run
    training: Training
    lr: float
    model: Any
    task: Task
    train: Corpus
    held_out: Corpus | None
    freezes: Freeze | None = None  # what the recipe says of the part that stands still
    thaws: tuple[dict[str, Any], ...] = ()  # the freeze plan's
    adapter: AdapterRules | None = None  # that was put into the model
    l2_sp: float = 0.0
    new_parameters: tuple[str, ...] = ()  # that the parent has not
    frozen_before: frozenset[str] = frozenset()  # what stood still before that
