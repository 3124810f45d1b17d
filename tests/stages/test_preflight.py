"""What is checked before any stage has run: the options of optimizers and schedules, of all stages at once."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit import catalog
from llmkit.errors import RecipeError
from llmkit.recipe.load import validate
from llmkit.recipe.schema import Recipe
from llmkit.stages.preflight import check_recipe

PACKAGES = {"lion": "lion_pytorch", "adamw8bit": "bitsandbytes"}


def recipe(**keys: Any) -> Recipe:
    base = {"name": "x", "task": "text", "model": "m", "data": {"train": "rows.jsonl"}, "stages": ["finetune"]}
    return validate({**base, **keys}, {})


def test_wrong_options_of_all_stages_are_told_at_once() -> None:
    wrong = recipe(
        stages=["pretrain", "finetune"],
        pretrain={"schedule": {"name": "wsd", "shap": "linear"}, "optimizer": {"name": "muon", "momentum": 2}},
        finetune={"schedule": {"name": "step", "every": "often"}, "optimizer": {"name": "sgd", "nesterov": 3}},
    )
    with pytest.raises(RecipeError, match="4 mistakes") as caught:
        check_recipe(wrong, wrong.plan)
    assert {problem.where for problem in caught.value.problems} == {
        "pretrain.schedule.shap",
        "pretrain.optimizer.momentum",
        "finetune.schedule.every",
        "finetune.optimizer.nesterov",
    }


@pytest.mark.parametrize("name", catalog.names("optimizer"))
def test_every_optimizer_passes_with_its_defaults(name: str) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    check_recipe(recipe(finetune={"optimizer": name}), ("finetune",))


@pytest.mark.parametrize("name", catalog.names("schedule"))
def test_every_schedule_passes_with_its_defaults(name: str) -> None:
    check_recipe(recipe(finetune={"schedule": name, "eval_every": 5}), ("finetune",))


def test_a_missing_package_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    def version(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RecipeError) as caught:
        check_recipe(recipe(finetune={"optimizer": "adamw8bit"}), ("finetune",))
    (problem,) = caught.value.problems
    assert problem.where == "finetune.optimizer"
    assert "pip install 'bitsandbytes>=0.50'" in (problem.hint or "")
