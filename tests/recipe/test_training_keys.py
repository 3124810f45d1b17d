"""The keys `schedule` and `optimizer`: a name, or a name with options; and what they need beside them."""

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
