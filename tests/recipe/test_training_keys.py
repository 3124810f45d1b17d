"""The keys of the stages that train: names with options, what excludes what, and what is out of range."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from llmkit.errors import RecipeError
from llmkit.recipe.load import dump_recipe, validate
from llmkit.recipe.schema import Recipe

BASE = {"name": "x", "task": "text", "model": "m", "data": {"train": "rows.jsonl"}}


def recipe(**finetune: Any) -> Recipe:
    return validate({**BASE, "finetune": finetune}, {})


def test_a_schedule_is_a_name_or_a_name_with_options() -> None:
    assert (recipe().finetune.schedule.name, recipe().finetune.schedule.options) == ("cosine", {})
    assert recipe(schedule="linear").finetune.schedule.name == "linear"
    long = recipe(schedule={"name": "wsd", "decay": "20%"}).finetune.schedule
    assert (long.name, long.options) == ("wsd", {"decay": "20%"})
    assert recipe(schedule={"floor": 0.1}).finetune.schedule.name == "cosine"


@pytest.mark.parametrize("given", ["wsd", {"name": "wsd", "decay": "20%", "floor": 0.1}])
def test_a_schedule_survives_being_written_down(given: Any) -> None:
    first = recipe(schedule=given)
    assert validate(yaml.safe_load(dump_recipe(first)), {}).finetune == first.finetune


@pytest.mark.parametrize("key", ["schedule", "optimizer"])
def test_an_unknown_name_in_the_long_form(key: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**{key: {"name": "cosin" if key == "schedule" else "adamm"}})
    (problem,) = caught.value.problems
    assert f"`finetune.{key}.name`" in problem.what
    assert "did you mean" in (problem.hint or "")


def test_plateau_needs_evaluations() -> None:
    with pytest.raises(RecipeError, match="`schedule: plateau` needs `eval_every`"):
        recipe(schedule={"name": "plateau", "patience": 1})
    assert recipe(schedule="plateau", eval_every=5).finetune.schedule.name == "plateau"


def test_all_that_does_not_fit_together_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(schedule="plateau", early_stopping={}, steps=3, epochs=1)
    said = " ".join(problem.what for problem in caught.value.problems)
    assert len(caught.value.problems) == 3
    assert all(part in said for part in ("not both", "`early_stopping` needs", "`schedule: plateau` needs"))


def test_the_new_keys_have_defaults_that_change_nothing() -> None:
    keys = recipe().finetune
    assert (keys.batch_size, keys.batch_tokens, keys.micro_batch_size) == (None, None, None)
    assert keys.micro_batch_tokens == "auto"
    assert (keys.activation_checkpointing, keys.compile) == (False, False)
    assert (keys.dropout, keys.label_smoothing, keys.neftune_alpha, keys.ema) == (None, 0.0, 0.0, None)


@pytest.mark.parametrize(
    "given",
    [
        {"batch_tokens": 4096},
        {"micro_batch_tokens": 512},
        {"micro_batch_tokens": "auto"},
        {"activation_checkpointing": True, "compile": True},
        {"dropout": 0.0},
        {"dropout": 0.1, "label_smoothing": 0.1, "neftune_alpha": 5, "ema": 0.999},
    ],
)
def test_the_new_keys_survive_being_written_down(given: dict[str, Any]) -> None:
    first = recipe(**given)
    assert all(getattr(first.finetune, key) == value for key, value in given.items())
    assert validate(yaml.safe_load(dump_recipe(first)), {}).finetune == first.finetune


@pytest.mark.parametrize(
    "given",
    [
        {"batch_tokens": 0},
        {"batch_tokens": "many"},
        {"micro_batch_tokens": 0},
        {"micro_batch_tokens": "most"},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"neftune_alpha": -1},
        {"ema": 0},
        {"ema": 1},
        {"compile": "perhaps"},
        {"activation_checkpointing": 3},
    ],
)
def test_values_out_of_range_name_their_key(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**given)
    [key] = given
    assert any(f"finetune.{key}" in problem.what for problem in caught.value.problems)


def test_a_batch_is_of_examples_or_of_tokens() -> None:
    with pytest.raises(RecipeError, match="`batch_size` or `batch_tokens`, not both") as caught:
        recipe(batch_size=8, batch_tokens=4096)
    [problem] = caught.value.problems
    assert problem.hint == "leave one of them out: --set finetune.batch_size=null does"
