"""Where a run is tracked, and its final scores on their way there."""

from __future__ import annotations

from typing import Any

from llmkit.recipe.schema import Recipe
from llmkit.recipe.training import Training
from llmkit.run.directory import Artifact, Run
from llmkit.train.hooks.trackers import Tracking, flat_config, track_scores

_TRAINS = ("finetune", "pretrain")


def tracking_of(recipe: Recipe, run: Run, stage: str) -> Tracking:
    """The trackers of a stage that trains: the project is the recipe, a run of it is the run directory's stage."""
    training: Training = getattr(recipe, stage)
    name = f"{run.path.resolve().name}-{stage}"
    return Tracking(tuple(training.trackers), run.folder(stage), recipe.name, name, f"{stage}.trackers")


def config_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe as trackers take it."""
    return flat_config(recipe.model_dump(mode="json"))


def send_scores(recipe: Recipe, run: Run, artifact: Artifact) -> None:
    """Puts what a training or an evaluation measured into the trackers of the training that it belongs to."""
    if artifact.stage not in (*_TRAINS, "evaluate"):
        return
    trained = (artifact.stage,) if artifact.stage in _TRAINS else _TRAINS
    stage = next((name for name in trained if name in recipe.plan and getattr(recipe, name) is not None), None)
    if stage is not None and getattr(recipe, stage).trackers:
        step = run.stage(stage).get("metrics", {}).get("steps", 0)
        track_scores(tracking_of(recipe, run, stage), config_of(recipe), artifact.metrics, step, run.reporter.warn)
