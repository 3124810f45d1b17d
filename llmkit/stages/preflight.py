"""What can be known to fail before any stage has run: names and options that only the code behind them knows.

The recipe's own checks come first and need no heavy import; these come next, so that a metric's name that is misspelt
does not wait for the training to end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from llmkit.data.augment import build_augmentations
from llmkit.data.filters import build_filters
from llmkit.errors import Problem, RecipeError
from llmkit.model.adapters import add_adapters
from llmkit.model.freezing import FreezePlan, apply_freeze
from llmkit.model.groups import parameter_groups
from llmkit.model.loading import build_on_meta, load_config
from llmkit.model.location import locate
from llmkit.optim import build_optimizer, build_schedule
from llmkit.recipe.schema import Recipe
from llmkit.recipe.training import Training
from llmkit.stages.against import require_others
from llmkit.stages.base import adapter_rules, freeze_plan, task_class, within
from llmkit.stages.benchmark_tasks import check_benchmarks
from llmkit.stages.evaluate import wanted_metrics
from llmkit.stages.training import rates_of


def check_recipe(recipe: Recipe, stages: Sequence[str], run: Path | None = None) -> None:
    """Raises RecipeError with every wrong filter, optimizer, schedule, metric and freeze rule of the stages to be run.

    With a run directory also ArtifactError and DataError, for other models and data sets to score that are missing.
    """
    problems: list[Problem] = []
    for check in _checks(recipe, stages):
        try:
            check()
        except RecipeError as error:
            problems += error.problems
    if problems:
        one = problems[0] if len(problems) == 1 else Problem(f"the recipe has {len(problems)} mistakes")
        raise RecipeError(
            one.what, got=one.got, expected=one.expected, hint=one.hint, where=one.where, problems=problems
        )
    if "evaluate" in stages and run is not None:
        require_others(recipe, run)


def _checks(recipe: Recipe, stages: Sequence[str]) -> Iterator[Callable[[], Any]]:
    yield lambda: build_filters(recipe.data.filters)
    yield lambda: build_augmentations(recipe.data.augment)
    if "pretrain" in stages and recipe.pretrain is not None:
        yield from _training_checks("pretrain", recipe.pretrain)
    if "finetune" in stages:
        yield from _training_checks("finetune", recipe.finetune)
    if "finetune" in stages and recipe.finetune.adapter is not None and recipe.model is not None:
        yield lambda: _within("finetune", lambda: _check_adapter(recipe))
    for stage in ("pretrain", "finetune"):
        section = getattr(recipe, stage)
        if stage in stages and section is not None and section.rates and recipe.model is not None:
            yield partial(_within, stage, partial(_check_rates, recipe, stage, section))
    if "freeze" in stages and "pretrain" in stages and recipe.model is not None:
        yield lambda: _check_freeze(recipe)  # without pretraining the freeze stage itself is early enough
    if "evaluate" in stages:
        yield lambda: wanted_metrics(recipe)
        yield lambda: check_benchmarks(recipe)


def _training_checks(stage: str, training: Training) -> Iterator[Callable[[], Any]]:
    """Builds the schedule, and the optimizer for one made-up matrix."""
    import torch

    optimizer, schedule = training.optimizer, training.schedule
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1, 1))], "hidden": [True]}]
    yield lambda: _within(stage, lambda: build_optimizer(optimizer.name, groups, lr=1e-5, options=optimizer.options))
    yield lambda: _within(stage, lambda: build_schedule(schedule.name, schedule.options))


def _within(stage: str, check: Callable[[], Any]) -> None:
    with within(stage):
        check()


def _check_rates(recipe: Recipe, stage: str, training: Training) -> None:
    """Groups the parameters of the model that the recipe starts from."""
    model = _outline(recipe, task_class(recipe).auto_class if stage == "finetune" else "AutoModelForCausalLM")
    if stage == "finetune" and (plan := _plan(recipe, model)) is not None:
        apply_freeze(model, plan)
    parameter_groups(model, rates_of(training, 1e-5), weight_decay=training.weight_decay)


def _check_adapter(recipe: Recipe) -> None:
    """Puts adapters into the model that the recipe starts from, as far as it is known what stands still."""
    assert recipe.finetune.adapter is not None, "it was asked for"
    model = _outline(recipe, task_class(recipe).auto_class)
    plan = _plan(recipe, model)
    add_adapters(model, adapter_rules(recipe.finetune.adapter), plan.frozen_for_good if plan is not None else ())


def _outline(recipe: Recipe, auto_class: str) -> Any:
    """The model that the recipe starts from, without weights."""
    return build_on_meta(load_config(locate(str(recipe.model))), auto_class)


def _plan(recipe: Recipe, model: Any) -> FreezePlan | None:
    """What stands still; None for nothing, and for mistakes, which the freeze stage tells."""
    if "freeze" in recipe.plan:
        with suppress(RecipeError):
            return freeze_plan(recipe, model)
    return None


def _check_freeze(recipe: Recipe) -> None:
    """Plans the freezing of the model that pretraining goes on from; it has the same parts afterwards."""
    assert recipe.freeze is not None, "the schema asks for a section `freeze` when there is such a stage"
    freeze_plan(recipe, _outline(recipe, task_class(recipe).auto_class))
