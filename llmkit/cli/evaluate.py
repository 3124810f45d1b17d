"""What `llmkit evaluate` was given: a recipe, a run, or any model with data to score it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from llmkit.cli.recipes import recipe_or_model
from llmkit.errors import LlmkitError
from llmkit.recipe.load import load_recipe


def model_to_score(
    text: str | None, has_data: bool, against: tuple[str, ...], settings: tuple[str, ...], out: Path | None = None
) -> tuple[Path | None, str | None, tuple[str, ...]]:
    """The recipe or the model that an argument names, and the settings with what is to be held against it.

    A run with other data is a model: it is held against its own parent, and read as it was trained.
    """
    said = {setting.partition("=")[0] for setting in settings}
    if against and "evaluate.against" in said:
        raise typer.BadParameter("`evaluate.against` is given twice, by --set and --against: leave one out")
    path, model = recipe_or_model(text)
    if path is not None and out is not None and not has_data and (path / "run.json").is_file():
        raise typer.BadParameter(
            f"{path} is a run, and is scored where it is: leave out -o, or give --data to score it on"
        )
    inherited: dict[str, Any] = {}
    if path is not None and has_data and (path / "run.json").is_file():
        model, inherited, path = str(text), _of_run(path), None
        parent = inherited.pop("parent")
        if not against and parent and "evaluate.against" not in said:
            against = ("parent",)
        against = tuple(parent if uri == "parent" and parent else uri for uri in against)
    given = [f"{key}={json.dumps(value)}" for key, value in inherited.items() if value is not None and key not in said]
    if against:
        given.append(f"evaluate.against={json.dumps(against if len(against) > 1 else against[0])}")
    return path, model, (*given, *settings)


def _of_run(run: Path) -> dict[str, Any]:
    """What a run's model was trained with, and its parent; nothing where its recipe cannot be read."""
    try:
        recipe = load_recipe(run / "recipe.yaml", [])
    except LlmkitError:
        return {"parent": None}
    return {
        "parent": recipe.model,
        "task": recipe.task,
        "data.max_length": recipe.data.max_length,
        "data.chat_template": recipe.data.chat_template,
    }
