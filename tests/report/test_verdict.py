"""Did it get better: the words follow the interval, and the direction of the metric."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from run_directories import RECIPE, RESULTS, make_run

from llmkit.report.blocks import Table
from llmkit.report.record import read_record
from llmkit.report.scores import slice_section
from llmkit.report.verdict import Verdict, lower_is_better, verdict


def judged(
    run: Path, before: float, after: float, bounds: Any, metric: str = "accuracy", p: float = 0.001, **recipe: Any
) -> Verdict:
    """The verdict on one metric with an interval of the difference."""
    results = {
        "model": {metric: after},
        "parent": {metric: before},
        "models": ["model", "parent"],
        "examples": 100,
        "differences": {
            "parent": {
                metric: dict(
                    zip(
                        ("low", "high", "p"),
                        (*bounds, p if bounds[0] is None or bounds[0] * bounds[1] > 0 else 0.2),
                        strict=True,
                    )
                )
            }
            if bounds
            else {}
        },
    }
    found = verdict(read_record(make_run(run, results=results, recipe=RECIPE | recipe)))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("metric", "before", "after", "bounds", "kind"),
    [
        ("accuracy", 0.4, 0.9, (0.3, 0.6), "better"),
        ("accuracy", 0.9, 0.4, (-0.6, -0.3), "worse"),
        ("accuracy", 0.8, 0.82, (-0.01, 0.05), "open"),
        ("accuracy", 0.8, 0.82, (0.0, 0.05), "open"),
        ("accuracy", 0.8, 0.8, (0.0, 0.0), "none"),
        ("accuracy", 0.8, 0.9, None, "none"),
        ("loss", 2.0, 1.0, (-1.2, -0.8), "better"),
        ("loss", 1.0, 2.0, (0.8, 1.2), "worse"),
        ("general_loss", 1.0, 2.0, (0.8, 1.2), "worse"),
        ("mine.py:score", 1.0, 2.0, (0.8, 1.2), "none"),
        ("mine.py:score", 1.0, 2.0, (-0.8, 1.2), "open"),
    ],
)
def test_the_kind_of_verdict(metric: str, before: float, after: float, bounds: Any, kind: str, tmp_path: Path) -> None:
    assert judged(tmp_path, before, after, bounds, metric).kind == kind


def test_an_interval_with_zero_in_it_is_said_to_tell_nothing(tmp_path: Path) -> None:
    found = judged(tmp_path, 0.80, 0.82, (-0.01, 0.05))
    assert found.word == "No clear difference"
    assert (
        "The interval contains zero, so 100 held-out examples cannot tell a difference from chance." in found.sentence
    )
    assert "−0.0100 to 0.0500, p = 0.200" in found.sentence


def test_without_an_interval_nothing_is_claimed(tmp_path: Path) -> None:
    found = judged(tmp_path, 0.80, 0.82, None)
    assert found.word == "The accuracy rose"
    assert "There is no interval, so that nothing tells how much of it may be chance." in found.sentence


def test_without_another_model(tmp_path: Path) -> None:
    results = {key: value for key, value in RESULTS.items() if key not in ("parent", "models")}
    found = verdict(read_record(make_run(tmp_path, results=results | {"intervals": RESULTS["intervals"]})))
    assert found is not None
    assert "is 0.9000 (95 % interval 0.8300 to 0.9500); it was held against no other model" in found.sentence


def test_results_of_before_there_were_intervals(tmp_path: Path) -> None:
    old = {"model": {"accuracy": 0.9}, "parent": {"accuracy": 0.4}, "examples": 10, "tables": {}, "samples": []}
    found = verdict(read_record(make_run(tmp_path, results=old)))
    assert found is not None
    assert found.kind == "none"
    assert "from 0.4000 to 0.9000" in found.sentence


def test_the_metric_that_the_recipe_names_first_speaks(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    run = make_run(tmp_path, results=results, recipe=RECIPE | {"evaluate": {"metrics": ["f1", "accuracy"]}})
    found = verdict(read_record(run))
    assert found is not None
    assert found.change is not None
    assert found.change.metric == "f1"
    assert found.kind == "open"


def test_nothing_is_said_without_scores(tmp_path: Path) -> None:
    assert verdict(read_record(make_run(tmp_path, results=None))) is None


def test_every_metric_of_the_catalogue_has_a_direction() -> None:
    assert lower_is_better("perplexity") is True
    assert lower_is_better("general_bits_per_byte") is True
    assert lower_is_better("rougeL") is False
    assert lower_is_better("mine.py:score") is None


def test_too_few_examples_for_an_interval_have_a_p_value(tmp_path: Path) -> None:
    found = judged(tmp_path, 0.5, 0.8, (None, None), p=0.76)
    assert (found.kind, found.word) == ("none", "The accuracy rose")
    assert "+0.3000 (p = 0.760). There is no interval, so that its size is not known well." in found.sentence


def test_metrics_without_an_interval_are_counted_too(tmp_path: Path) -> None:
    def several(**bounds: Any) -> str:
        results = {
            "model": {"accuracy": 0.9, "loss": 1.0, "f1": 0.5, "recall": 0.5, "precision": 0.5, "mine.py:score": 2.0},
            "parent": {"accuracy": 0.4, "loss": 2.0, "f1": 0.4, "recall": 0.4, "precision": 0.5, "mine.py:score": 1.0},
            "models": ["model", "parent"],
            "examples": 100,
            "differences": {"parent": {metric: {"low": low, "high": high} for metric, (low, high) in bounds.items()}},
        }
        found = verdict(read_record(make_run(tmp_path, results=results)))
        assert found is not None
        return found.more

    known = {"accuracy": (0.3, 0.6), "loss": (-1.2, -0.8), "mine.py:score": (0.8, 1.2), "precision": (0.0, 0.0)}
    assert several(**known) == (
        "Of the 5 other metrics 1 got better, 1 stayed the same, 1 changed, and whether for the better is not known and "
        "2 have no interval. Each is judged by itself, as if there were no others."
    )
    assert "1 got better and 4 have no interval." in several(**dict(list(known.items())[:2]))
    assert several(accuracy=(0.3, 0.6)) == ""


def test_a_head_that_learnt_nothing_is_named(tmp_path: Path) -> None:
    results = RESULTS | {"untrained": {"parent": ["classifier.weight"]}}
    found = verdict(read_record(make_run(tmp_path, results=results)))
    assert found is not None
    assert found.more.startswith("Nothing was ever learnt in the head of the parent: its scores are those of chance.")


def test_a_verdict_on_some_examples_says_of_how_many(tmp_path: Path) -> None:
    results = copy.deepcopy(RESULTS)
    for who in ("model", "parent"):
        results[who]["rougeL"] = 0.5
    results["scored"] = {"rougeL": 32}
    results["slices"][0] |= {"model": {"rougeL": 0.4}, "parent": {"rougeL": 0.3}, "scored": {"rougeL": 7}}
    recipe = RECIPE | {"evaluate": {"metrics": ["rougeL"]}}
    record = read_record(make_run(tmp_path, results=results, recipe=recipe))
    found = verdict(record)
    assert found is not None
    rows = [row for block in slice_section(record).blocks if isinstance(block, Table) for row in block.rows]
    assert rows[0][1] == "7"
    assert "over 32 held-out examples" in found.sentence
