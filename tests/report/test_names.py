"""How a page calls models: by URI where a run only evaluates, `before` and `after` only where there is a parent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pages import Element, read_page
from run_directories import RECIPE, RESULTS, STATISTICS, make_run, prediction

from llmkit.report.page import report_html
from llmkit.report.record import read_record

BETTER = {"accuracy": {"low": 0.39, "high": 0.61, "p": 0.0005}}
OPEN = {"accuracy": {"low": -0.1, "high": 0.2, "p": 0.4}}
WORSE = {"accuracy": {"low": -0.3, "high": -0.1, "p": 0.0005}}


def evaluated(run: Path, against: Any = "parent", **results: Any) -> Element:
    """The page of a run that only evaluates."""
    statistics = json.loads(json.dumps(STATISTICS))
    statistics["corpora"]["train"] |= {"examples": 0, "tokens": 0}
    scored = {key: RESULTS[key] for key in ("model", "examples", "intervals", "data_sets", "gaps")}
    make_run(
        run,
        results=scored | {"models": ["model"]} | results,
        recipe=RECIPE | {"model": "pkg://mine/model", "evaluate": {"against": against}},
        **{"freeze": None, "statistics": statistics, "log": None, "predictions": None},
    )
    record = json.loads((run / "run.json").read_text())
    record["stages"] = {name: record["stages"][name] for name in ("preprocess", "evaluate")}
    (run / "run.json").write_text(json.dumps(record))
    return read_page(report_html(read_record(run)))


def against(**differences: Any) -> dict[str, Any]:
    """Results against several models of accuracy 0.4, or 1.0 where the model is worse."""
    scores = {who: {"accuracy": 1.0 if found is WORSE else 0.4} for who, found in differences.items()}
    return {"models": ["model", *differences], "differences": differences, **scores}


def test_a_run_that_only_evaluates_names_its_model_and_trains_on_nothing(tmp_path: Path) -> None:
    text = evaluated(tmp_path).text
    assert "This run scored pkg://mine/model on 100 held-out examples." in text
    assert "training examples" not in text


def test_a_model_that_it_is_held_against_is_shown_with_its_uri(tmp_path: Path) -> None:
    page = evaluated(tmp_path, "pkg://theirs/model", **against(other=BETTER))
    assert "scored pkg://mine/model on 100 held-out examples against pkg://theirs/model." in page.text
    assert "from 0.4000 to 0.9000 against pkg://theirs/model" in page.text
    scores = page.by_id("scores").text
    assert "In the tables `model` is pkg://mine/model and `the other` is pkg://theirs/model." in scores
    assert "metric the other model difference" in scores
    assert "0.4000 for the other, +0.5000" in page.text
    for part in (page.all("header")[0].text, scores):
        assert "before" not in part
        assert "after" not in part


def test_of_a_run_that_trains_the_model_is_not_named_again(tmp_path: Path) -> None:
    text = read_page(report_html(read_record(make_run(tmp_path)))).text
    assert "scored it on 100 held-out examples against its parent" in text
    assert "In the tables" not in text
    assert "training examples 100" in text


def test_a_headline_says_only_what_is_so_against_each_model(tmp_path: Path) -> None:
    uris = ["pkg://one/model", "pkg://two/model"]
    for name, differences, said in (
        ("mixed", {"one": BETTER, "two": OPEN}, "Better than 1 and no clear difference from 1 of 2 models"),
        ("worse", {"one": BETTER, "two": WORSE}, "Better than 1 and worse than 1 of 2 models"),
        ("both", {"one": BETTER, "two": BETTER}, "Yes, it got better"),
    ):
        page = evaluated(tmp_path / name, uris, **against(**differences))
        (word,) = [line.text for line in page.all("p") if line.attributes.get("class") == "word"]
        assert word == said
        assert "against one (pkg://one/model) and two (pkg://two/model)" in page.text
        assert "against two (pkg://two/model):" in page.text


def test_data_sets_and_gaps_say_model_where_there_is_no_before(tmp_path: Path) -> None:
    scores = evaluated(tmp_path / "alone").by_id("scores").text
    assert "accuracy, model train" in scores
    assert "over-fitting, accuracy train held out model" in scores
    scores = read_page(report_html(read_record(make_run(tmp_path / "trained")))).by_id("scores").text
    assert "accuracy, model train" in scores  # which the parent was not scored on
    assert "metric before after difference" in scores


def test_an_example_without_an_answer_shows_its_loss_by_name(tmp_path: Path) -> None:
    lines = [prediction(n, 0, 0, model={"loss": 87.0, "tokens": 10}) for n in range(3)]
    results = {"model": {"loss": 8.7}, "models": ["model"], "examples": 3}
    page = read_page(report_html(read_record(make_run(tmp_path, results=results, predictions=lines))))
    assert "loss 8.700" in page.by_id("examples").text
    assert "answer" not in page.by_id("examples").text
