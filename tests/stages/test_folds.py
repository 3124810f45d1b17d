"""What several runs say together: mean, spread, interval; and which rows a share of the training data has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmkit.errors import RecipeError, UsageError
from llmkit.recipe.load import Override, load_recipe
from llmkit.recipe.schema import Recipe
from llmkit.stages.crossval import (
    CrossValidation,
    LearningCurve,
    models_of,
    outcome,
    over_folds,
    shares_of,
    spread,
    stages_setting,
)


def recipe_with(**keys: Any) -> Recipe:
    values = {"name": "r", "task": "chat", "model": "m", "data.train": "rows.jsonl"}
    values |= {key.replace("__", "."): value for key, value in keys.items()}
    return load_recipe(None, [Override(key, value, key) for key, value in values.items()])


def test_the_interval_is_that_of_students_t() -> None:
    from scipy.stats import ttest_1samp

    values = [0.61, 0.58, 0.66, 0.6, 0.63]
    found = spread(values)
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["std"] == pytest.approx(np.std(values, ddof=1))
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert found["values"] == values


def test_one_value_has_no_spread() -> None:
    assert spread([0.5]) == {"values": [0.5], "mean": 0.5, "std": None, "interval": None}


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_the_interval_holds_the_mean(values: list[float]) -> None:
    found = spread(values)
    if found["interval"] is None:
        assert math.isclose(min(values), max(values))
        return
    low, high = found["interval"]
    assert low <= found["mean"] <= high
    assert math.isclose(found["mean"] - low, high - found["mean"], abs_tol=1e-6)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    covered = [low <= 3.0 <= high for low, high in (spread(row.tolist())["interval"] for row in draws)]
    assert 0.935 < np.mean(covered) < 0.965


def test_intervals_stay_among_the_possible_values() -> None:
    whole = {
        "precision": [0.18, 0.04, 0.04],
        "bleu": [1.0, 0.5, 99.0],
        "loss": [0.1, 4.0, 0.2],
        "mine": [0.1, 4.0, 0.2],
    }
    whole |= {"general_perplexity": [1.1, 9.0, 1.2], "accuracy": [1.0, 0.8, 1.0], "r2": [0.99, 0.2, 1.0]}
    folds = [{metric: values[n] for metric, values in whole.items()} for n in range(3)]
    found = over_folds([{"model": fold, "parent": fold | {"precision": 1.0}} for fold in folds])
    intervals = {metric: each["interval"] for metric, each in found["scores"]["model"].items()}
    assert intervals["precision"][0] == 0.0
    assert intervals["bleu"] == [0.0, 100.0]
    assert intervals["loss"][0] == 0.0
    assert intervals["loss"][1] > 4.0
    assert intervals["mine"][0] < 0.0, "nothing is known of the user's own"
    assert intervals["general_perplexity"][0] == 1.0
    assert intervals["accuracy"][1] == 1.0
    assert intervals["r2"][1] == 1.0
    assert found["differences"]["parent"]["precision"]["interval"][0] == -1.0


def test_every_metric_of_the_catalogue_has_a_range() -> None:
    from llmkit import catalog
    from llmkit.stages.crossval import RANGES

    assert set(catalog.names("metric")) <= set(RANGES)


def test_differences_are_taken_fold_by_fold() -> None:
    folds = [
        {"model": {"loss": 1.0, "f1": 0.5}, "parent": {"loss": 2.0}},
        {"model": {"loss": 3.0, "f1": 0.7}, "parent": {"loss": 4.5}},
        {"model": {"loss": 5.0}, "parent": {"loss": 6.0}},
    ]
    found = over_folds(folds)
    assert found["scores"]["model"]["loss"]["mean"] == 3.0
    assert found["scores"]["model"]["f1"]["values"] == [0.5, 0.7, None]
    assert found["differences"]["parent"]["loss"]["values"] == [-1.0, -1.5, -1.0]
    late = over_folds([{"model": {"loss": 1.0}}, {"model": {"loss": 2.0, "roc_auc": 0.8}}])
    assert late["scores"]["model"]["roc_auc"]["values"] == [None, 0.8]
    assert set(found["differences"]["parent"]) == {"loss"}
    assert "differences" not in over_folds([{"model": {"loss": 1.0}}, {"model": {"loss": 2.0}}])


def test_a_score_that_a_fold_lacks_stands_beside_its_fold() -> None:
    folds = [
        {"model": {"loss": 1.0}, "parent": {"loss": 2.0, "auc": 0.9}},
        {"model": {"loss": 3.0, "auc": 0.5}, "parent": {"loss": 4.5, "auc": 0.25}},
        {"model": {"loss": 5.0, "auc": 0.75}, "parent": {"loss": 6.0, "auc": 0.25}},
    ]
    found = over_folds(folds)
    assert found["scores"]["model"]["auc"]["values"] == [None, 0.5, 0.75]
    assert found["scores"]["model"]["auc"]["mean"] == 0.625
    assert found["scores"]["parent"]["auc"]["values"] == [0.9, 0.25, 0.25]
    difference = found["differences"]["parent"]["auc"]
    assert difference["values"] == [None, 0.25, 0.5]
    assert difference["mean"] == 0.375
    assert difference["means"] == {"model": 0.625, "parent": 0.25}, "over the folds that both have"


def test_values_that_are_all_alike_have_no_interval() -> None:
    apart = spread([0.9 - 0.4, 0.8 - 0.3, 0.7 - 0.2], differences=True)
    assert apart["interval"] is None
    assert apart["std"] == 0.0
    assert "all folds differ by the same amount" in apart["why"]
    assert spread([0.0, 0.0, 0.0], differences=True)["interval"] == [0.0, 0.0], "the models say the same"
    assert spread([1.0, 1.0, 1.0])["interval"] is None
    assert "why" not in spread([0.5, None, None])


def test_why_a_fold_has_no_score_is_kept(tmp_path: Path) -> None:
    results = {"model": {"loss": 1.0}, "examples": 3, "reasons": {"model": {"roc_auc": "one label alone"}}}
    stages = {"preprocess": {"metrics": {"train_examples": 9}}}
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"stages": stages}))
    (tmp_path / "evaluate" / "results.json").write_text(json.dumps(results))
    assert outcome(tmp_path)["reasons"] == results["reasons"]


def test_models_are_found_among_results() -> None:
    results = {
        "model": {"loss": 1.0},
        "parent": {"loss": 2.0},
        "SmolLM2": {"loss": 2.0},
        "examples": 3,
        "samples": [],
        "intervals": {"model": {"loss": [0.0, 1.0]}},
        "reasons": {"model": {"f1": "why"}},
        "benchmarks": {},
    }
    assert models_of(results) == ["model", "parent", "SmolLM2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10%,25%,100%", ("10%", "25%", "100%")), ("50%, 5%,50%", ("5%", "50%")), ("2.5%", ("2.5%",))],
)
def test_shares_are_sorted(text: str, expected: tuple[str, ...]) -> None:
    assert shares_of(text) == expected


@pytest.mark.parametrize("text", ["", "10", "10%,0%", "120%", "a%", "10%;20%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="shares of the training data"):
        shares_of(text)


def test_a_fold_is_a_recipe_of_its_own() -> None:
    recipe = recipe_with(stages=["preprocess", "finetune", "export"])
    whole = CrossValidation(recipe, 4, Path("out"))
    assert whole.settings(3) == ("name=r", "data.fold=3/4", "stages=[preprocess, finetune, evaluate]")
    assert whole.run_of(3) == Path("out/fold-3")
    assert stages_setting(recipe_with()) == "stages=[preprocess, finetune, evaluate]"


def test_only_data_that_can_be_divided_is(tmp_path: Path) -> None:
    for keys in ({"data__eval": "held-out.jsonl"}, {"data__eval": None, "stages": ["preprocess", "finetune"]}):
        with pytest.raises(RecipeError, match="cross-validation divides"):
            CrossValidation(recipe_with(**keys), 3, tmp_path / "out").check()
    with pytest.raises(RecipeError, match="trains a model several times"):
        CrossValidation(recipe_with(stages=["preprocess", "evaluate"]), 3, tmp_path / "out").check()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    recipe = recipe_with()
    whole = CrossValidation(recipe, 3, tmp_path)
    whole.check()
    (tmp_path / "letter.txt").write_text("Dear all")
    with pytest.raises(UsageError, match="something else than folds"):
        whole.check()
    (tmp_path / "crossval.json").write_text(json.dumps({"name": "r", "folds": 3, "done": 0}))
    CrossValidation(recipe, 5, tmp_path).check()  # a number that was mistyped blocks nothing
    (tmp_path / "crossval.json").write_text(json.dumps({"name": "r", "folds": 3, "done": 1}))
    whole.check()
    with pytest.raises(UsageError, match="another cross-validation"):
        CrossValidation(recipe, 5, tmp_path).check()
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="a folder of their own"):
        whole.check()


def test_a_curve_needs_something_that_learns_from_all_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="a learning curve trains"):
        LearningCurve(recipe_with(stages=["preprocess", "evaluate"]), ("10%",), tmp_path).check()
    with pytest.raises(RecipeError, match="shares of all training data"):
        LearningCurve(recipe_with(data__train_share="20%"), ("10%",), tmp_path).check()


def test_the_whole_is_the_run_itself(tmp_path: Path) -> None:
    curve = LearningCurve(recipe_with(), ("2.5%", "50%", "100%"), tmp_path)
    assert curve.smaller == ("2.5%", "50%")
    assert curve.run_of("2.5%") == tmp_path / "learning-curve" / "share-2.5"
    assert curve.run_of("100%") == tmp_path
    assert "data.train_share=50%" in curve.settings("50%")
