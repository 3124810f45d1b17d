"""The page of a cross-validation, and the section of a learning curve."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import Element, read_page
from rich.console import Console
from run_directories import RESULTS, make_run

from llmkit.cli.crossval import show_folds
from llmkit.errors import ArtifactError, UsageError
from llmkit.report.page import write_report
from llmkit.stages.crossval import over_folds

ACCURACIES = (0.85, 0.9, 0.92)


def make_folds(folder: Path, *, done: int = 3, alone: bool = False) -> Path:
    """Three folds, of which some are done, as `llmkit crossval` leaves them; `alone` without a parent."""
    runs: list[dict[str, Any]] = []
    for fold, accuracy in enumerate(ACCURACIES[:done], 1):
        scores = {"model": {"accuracy": accuracy, "loss": 1 - accuracy}}
        intervals = {"model": {"accuracy": [accuracy - 0.05, accuracy + 0.05]}}
        if not alone:
            scores["parent"] = {"accuracy": 0.4, "loss": 1.1}
        make_run(folder / f"fold-{fold}")
        run = {"fold": fold, "run": f"fold-{fold}", "examples": 100, "train_examples": 200, "seconds": 7.5}
        runs.append(run | {"scores": scores, "intervals": intervals})
    found: dict[str, Any] = {"name": "animals", "folds": 3, "done": done, "written": "", "runs": runs}
    found |= over_folds([run["scores"] for run in runs]) if done > 1 else {}
    folder.mkdir(exist_ok=True)
    (folder / "crossval.json").write_text(json.dumps(found))
    return folder


def page_at(folder: Path) -> Element:
    return read_page(write_report(folder).read_text(encoding="utf-8"))


def test_the_page_of_a_cross_validation(tmp_path: Path) -> None:
    folder = make_folds(tmp_path)
    page = page_at(folder)
    assert (folder / "report.html").is_file()
    said = (
        "3 models trained from ./parent, each scored on the part of the data that it did not learn from: 300 examples"
    )
    assert said in page.text
    assert "Yes, it got better" in page.text
    assert "Over 3 folds the mean accuracy rose from 0.4000 to 0.8900 against its parent: +0.4900" in page.text
    scores = page.by_id("scores").text
    assert "accuracy 0.8500 0.9000 0.9200 0.8900 0.0361" in scores
    assert "fold 1: before 0.4000, after 0.8500" in scores
    assert "mean: before 0.4000, after 0.8900" in scores
    assert "are rough ones" in scores
    assert "fold 2 fold-2/report.html 100 200 7.5 s" in page.by_id("folds").text
    assert f"llmkit crossval {folder}/fold-1/recipe.yaml --folds 3" in page.by_id("again").text


def test_folds_that_are_not_done(tmp_path: Path) -> None:
    assert "None of the 3 folds is done yet." in page_at(make_folds(tmp_path / "none", done=0)).text
    one = page_at(make_folds(tmp_path / "one", done=1)).text
    assert "1 of 3 folds are done" in one
    assert "fold 1 done fold 2 not begun fold 3 not begun" in one
    two = make_folds(tmp_path / "two", done=2)
    make_run(two / "fold-3")
    assert "fold 2 done fold 3 begun" in page_at(two).text


def test_folds_without_another_model(tmp_path: Path) -> None:
    text = page_at(make_folds(tmp_path, alone=True)).text
    assert "The mean accuracy over 3 folds is 0.8900 (95 % interval" in text
    assert "held against no other model" in text


def test_a_damaged_cross_validation_is_named(tmp_path: Path) -> None:
    folder = make_folds(tmp_path)
    (folder / "crossval.json").write_text('{"name": "animals"}')
    with pytest.raises(ArtifactError) as caught:
        write_report(folder)
    assert "crossval.json" in str(caught.value.where)


def test_a_folder_of_runs_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "mine")
    with pytest.raises(UsageError) as caught:
        write_report(tmp_path)
    assert f"{tmp_path}/mine" in str(caught.value.hint)


def curve(**scores_at_the_end: float) -> dict[str, Any]:
    points = [
        {"share": "50%", "run": "learning-curve/share-50", "train_examples": 50, "seconds": 3.0}
        | {"scores": {"accuracy": 0.7}, "intervals": {"accuracy": [0.6, 0.8]}},
        {"share": "100%", "run": ".", "train_examples": 100, "seconds": 4.0}
        | {"scores": RESULTS["model"] | scores_at_the_end, "intervals": {"accuracy": [0.83, 0.95]}},
    ]
    before = {"scores": RESULTS["parent"], "intervals": RESULTS["intervals"]["parent"]}
    return {"name": "animals", "examples": 100, "points": points, "before": before}


def test_a_run_with_a_learning_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "learning-curve" not in [section.attributes["id"] for section in page_at(run).all("section")]
    (run / "learning_curve.json").write_text(json.dumps(curve()))
    text = page_at(run).by_id("learning-curve").text
    assert "0.7000 with 50 examples; 0.9000 with 100 examples; 0.4000 before training." in text
    assert "training examples 0 50 100" in text
    assert "accuracy 0.4000 (0.3100 to 0.5000) 0.7000 (0.6000 to 0.8000) 0.9000 (0.8300 to 0.9500)" in text
    assert "learnt anew" not in text


def test_a_learning_curve_of_an_earlier_model_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "learning_curve.json").write_text(json.dumps(curve(accuracy=0.91)))
    assert "The run has learnt anew since this curve was made" in page_at(run).by_id("learning-curve").text


def test_metrics_that_stay_the_same_are_called_so_in_the_table_too(tmp_path: Path) -> None:
    folder = make_folds(tmp_path)
    found = json.loads((folder / "crossval.json").read_text())
    for who in ("model", "parent"):
        found["scores"][who]["recall"] = found["scores"]["model"]["accuracy"]
    found["differences"]["parent"]["recall"] = {"mean": 0.0, "interval": [0.0, 0.0]}
    (folder / "crossval.json").write_text(json.dumps(found))
    scores = page_at(folder).by_id("scores").text
    assert "1 stayed the same" in scores
    assert "recall 0.8900 0.8900 0.0000 0.0000 to 0.0000 the same" in scores
    assert "not clear" not in scores


def folds_that_lack(folder: Path) -> dict[str, Any]:
    """Three folds, the first of which has no ROC-AUC of the model."""
    found = json.loads((make_folds(folder) / "crossval.json").read_text())
    for run, mine, theirs in zip(found["runs"], (None, 0.5, 0.75), (0.9, 0.25, 0.2), strict=True):
        run["scores"]["model"] |= {} if mine is None else {"roc_auc": mine}
        run["scores"]["parent"]["roc_auc"] = theirs
    found["runs"][0]["reasons"] = {"model": {"roc_auc": "one label alone"}}
    found |= over_folds([run["scores"] for run in found["runs"]])
    (folder / "crossval.json").write_text(json.dumps(found))
    return dict(found)


def test_a_score_that_a_fold_lacks_has_a_gap_and_a_reason(tmp_path: Path) -> None:
    folds_that_lack(tmp_path)
    scores = page_at(tmp_path).by_id("scores").text
    assert "ROC-AUC \u2013 0.5000 0.7500 0.6250 0.1768" in scores
    assert "ROC-AUC: fold 1 has none (one label alone)." in scores
    assert "ROC-AUC 0.2250 0.6250 +0.4000" in scores, "over the folds that both have"


def test_a_metric_that_speaks_may_be_absent_from_the_first_fold(tmp_path: Path) -> None:
    folds_that_lack(tmp_path)
    for fold in (1, 2, 3):
        recipe = yaml.safe_load((tmp_path / f"fold-{fold}" / "recipe.yaml").read_text())
        recipe["evaluate"] = {"metrics": ["roc_auc"]}
        (tmp_path / f"fold-{fold}" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    text = page_at(tmp_path).text
    assert "The mean ROC-AUC went from 0.2250 to 0.6250" in text
    assert "so 2 folds cannot tell" in text


def test_folds_that_differ_by_the_same_amount_prove_nothing(tmp_path: Path) -> None:
    found = json.loads((make_folds(tmp_path) / "crossval.json").read_text())
    for run in found["runs"]:
        run["scores"]["model"]["accuracy"] = 0.9
    found |= over_folds([run["scores"] for run in found["runs"]])
    (tmp_path / "crossval.json").write_text(json.dumps(found))
    text = page_at(tmp_path).text
    assert "Yes, it got better" not in text
    assert "accuracy: no interval, because all folds differ by the same amount" in text


def test_the_terminal_says_which_fold_lacks_a_score(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=StringIO())
    show_folds(console, folds_that_lack(tmp_path))
    lines = [line.split() for line in console.export_text().splitlines() if "roc_auc" in line]
    assert lines[0][1:4] == ["0.5000", "0.7500", "0.6250"]
    assert "roc_auc: fold 1: one label alone" in [" ".join(line) for line in lines]
