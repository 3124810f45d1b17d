"""`llmkit compare`: what is shown side by side, and when scores are said not to be comparable."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from pages import read_page
from run_directories import RECIPE, RESULTS, log_lines, make_run


def variant(**keys: Any) -> dict[str, Any]:
    """The recipe with other values of dotted keys."""
    found = copy.deepcopy(RECIPE)
    for key, value in keys.items():
        section, _, name = key.partition("__")
        (found.setdefault(section, {}) if name else found)[name or section] = value
    return found


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs that differ in the rate, the seed and the scores."""
    better = copy.deepcopy(RESULTS)
    better["model"]["accuracy"] = 0.95
    better["intervals"]["model"]["accuracy"] = [0.9, 0.98]
    other = variant(seed=18, finetune__lr=1e-3, finetune__steps=40)
    return [
        make_run(tmp_path / "one", predictions=None),
        make_run(tmp_path / "two", recipe=other, results=better, log=log_lines("finetune", 30), predictions=None),
    ]


def test_runs_side_by_side(runs: list[Path], cli: Cli) -> None:
    done = cli("compare", *runs)
    assert done.code == 0, done.err
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    assert "metric one two" in lines
    assert "accuracy 0.9000 (0.8300 to 0.9500) 0.9500 (0.9000 to 0.9800)" in lines
    assert "finetune: last training loss 0.3162 0.3651" in lines
    assert "finetune: lowest held-out loss 0.3479 0.4017" in lines
    assert "peak memory 3.0 GiB 3.0 GiB" in lines
    assert "seed 17 18" in lines
    assert "finetune.lr 0.0002 0.001" in lines
    assert not [line for line in lines if line.startswith(("note", "finetune.steps", "name "))]
    (spark,) = [line for line in lines if line.startswith("one training")]
    assert spark.split()[-1].startswith("█")
    assert spark.endswith("▁")


def test_json(runs: list[Path], cli: Cli) -> None:
    found = cli("compare", *runs, "--json").json
    assert (found["status"], found["command"], found["comparable"], found["notes"]) == ("done", "compare", True, [])
    assert (found["run_dir"], found["metrics"], found["artifacts"]) == (None, {}, {})
    assert found["seconds"] >= 0
    first, second = found["runs"]
    assert first["run_dir"] == str(runs[0])
    assert first["scores"]["accuracy"] == 0.9
    assert second["intervals"]["accuracy"] == [0.9, 0.98]
    assert first["cost"] == {
        "seconds": 14.0,
        "train_seconds": 4.0,
        "train_tokens": 3600,
        "tokens_per_second": 900.0,
        "peak_memory_bytes": 3 << 30,
    }
    assert first["losses"]["finetune"]["best_step"] == 40
    assert second["losses"]["finetune"]["steps"] == 40, "those that were taken, of which 30 are in the log"
    assert found["recipe_differences"] == {"seed": [17, 18], "finetune.lr": [0.0002, 0.001]}


def test_page(runs: list[Path], cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    assert cli("compare", *runs, "--html", file, "--json").json["artifacts"] == {"page": str(file)}
    page = read_page(file.read_text(encoding="utf-8"))
    assert [section.attributes["id"] for section in page.all("section")] == ["scores", "curves", "cost", "recipe"]
    captions = [caption.text for caption in page.all("figcaption")]
    assert captions[:2] == ["Accuracy", "Loss"]
    assert "Finetune: training loss" in captions
    assert "one: from 2.000 at step 1" in page.by_id("finetune-loss-description").text
    assert not page.all("script", "img")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": variant(task="chat")}, "the tasks differ: classify: one; chat: other"),
        (
            {
                "run": {
                    "stages": {"evaluate": {"state": "done"}, "preprocess": {"state": "done", "facts": {"corpora": {}}}}
                }
            },
            "the held-out data differ: one against other",
        ),
    ],
)
def test_scores_that_cannot_be_compared(
    change: dict[str, Any], said: str, runs: list[Path], cli: Cli, tmp_path: Path
) -> None:
    other = make_run(tmp_path / "other", **change)
    done = cli("compare", runs[0], other)
    assert f"Scores cannot be compared: {said}" in done.out
    assert cli("compare", runs[0], other, "--json").json["comparable"] is False


def test_a_run_without_scores_and_answers_of_other_lengths(runs: list[Path], cli: Cli, tmp_path: Path) -> None:
    bare = make_run(tmp_path / "bare", results=None, recipe=variant(evaluate__generate=8))
    done = cli("compare", runs[0], bare)
    assert f"bare has no scores: `llmkit evaluate {bare}` makes them." in done.out
    assert "Some scores may not be comparable: evaluate.generate differ" in done.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"recipe": variant(model=None, stages=["preprocess"])}, "its recipe has no model and trains none."),
        ({"recipe": variant(stages=["preprocess", "evaluate"])}, "`llmkit evaluate RUN` makes them."),
        ({"recipe": variant(data={"train": "rows.jsonl", "eval": None})}, "its recipe holds out no data."),
        ({"run": {"stages": {"preprocess": {"state": "done"}}}}, "`llmkit run RUN` makes them."),
        (
            {"run": {"stages": {"finetune": {"state": "data"}}}},
            "its finetune failed; `llmkit runs RUN` says how to go on.",
        ),
    ],
)
def test_advice_for_a_run_without_scores_works_for_it(
    change: dict[str, Any], said: str, runs: list[Path], cli: Cli, tmp_path: Path
) -> None:
    bare = make_run(tmp_path / "bare", results=None, **change)
    notes = cli("compare", runs[0], bare, "--json").json["notes"]
    assert f"bare has no scores: {said.replace('RUN', str(bare))}" in notes


def test_a_key_that_is_absent_and_one_at_its_default_do_not_differ(cli: Cli, tmp_path: Path) -> None:
    sources = [{"uri": "rows.jsonl"}, {"uri": "more.jsonl"}]
    plain = variant(finetune__early_stopping={"patience": 3}, finetune__eval_every=5)
    longer = variant(data__train=sources, data__filters=[{"length": {"max_chars": 9}}], finetune__eval_every=5)
    given = [make_run(tmp_path / "plain", recipe=plain), make_run(tmp_path / "longer", recipe=longer)]
    found = cli("compare", *given, "--json").json["recipe_differences"]
    stopping = {key: value for key, value in found.items() if "early_stopping." in key}
    assert stopping == {"finetune.early_stopping.patience": [3, None], "finetune.early_stopping.min_delta": [0.0, None]}
    assert {key: value for key, value in found.items() if key not in stopping} == {
        "data.train.1.uri": [None, "more.jsonl"],
        "data.filters.0.length.max_chars": [None, 9],
    }
    out = cli("compare", *given).out
    assert "data.train.1.uri" in out
    assert "data.train.1.columns" not in out
    assert "data.train.1.weight" not in out


def test_a_recipe_that_is_no_longer_understood_differs_only_where_it_says_so(cli: Cli, tmp_path: Path) -> None:
    given = [make_run(tmp_path / "new"), make_run(tmp_path / "old", recipe=variant(finetune__long_gone=3))]
    assert cli("compare", *given, "--json").json["recipe_differences"] == {"finetune.long_gone": [None, 3]}


@pytest.fixture
def folds(tmp_path: Path) -> Path:
    """A cross-validation of two folds whose accuracies are 0.9 and 0.8."""
    from llmkit.stages.crossval import over_folds

    folder = tmp_path / "cv"
    told = []
    for number, accuracy in ((1, 0.9), (2, 0.8)):
        facts = {"facts": {"corpora": {"eval": f"rows of fold {number}"}}}
        metrics = {"metrics": {"train_seconds": 4.0, "train_tokens": 3600, "peak_memory_bytes": number << 30}}
        stages = {
            "preprocess": {"state": "done", "seconds": 1.0 + number} | facts,
            "finetune": {"state": "done", "seconds": 10.0 + number} | metrics,
            "evaluate": {"state": "done", "seconds": 5.0 + number},
        }
        recipe = variant(data__fold=f"{number}/2", finetune__lr=1e-3)
        run = make_run(folder / f"fold-{number}", recipe=recipe, run={"stages": stages})
        scores = {"model": {"accuracy": accuracy}, "parent": {"accuracy": 0.5}}
        told.append({"fold": number, "run": run.name, "examples": 50, "scores": scores})
    found = {"name": "animals", "folds": 2, "done": 2, "runs": told} | over_folds([run["scores"] for run in told])
    (folder / "crossval.json").write_text(json.dumps(found))
    return folder


def test_a_folder_of_folds_is_one_of_the_runs(runs: list[Path], folds: Path, cli: Cli, tmp_path: Path) -> None:
    found = cli("compare", folds, runs[0], "--html", tmp_path / "page.html", "--json").json
    first, second = found["runs"]
    assert (first["name"], first["run_dir"], second["name"]) == ("cv", str(folds), "one")
    assert first["scores"] == {"accuracy": pytest.approx(0.85)}
    written = json.loads((folds / "crossval.json").read_text())["scores"]["model"]["accuracy"]
    assert first["intervals"] == {"accuracy": written["interval"]}
    assert first["examples"] == 100
    cost = first["cost"]
    assert (cost["seconds"], cost["train_seconds"], cost["train_tokens"]) == (2 + 3 + 11 + 12 + 6 + 7, 8.0, 7200)
    assert cost["peak_memory_bytes"] == 2 << 30
    assert found["recipe_differences"] == {"finetune.lr": [0.001, 0.0002], "data.fold": ["1/2 to 2/2", None]}
    assert found["comparable"] is False
    assert "the held-out data differ: cv against one" in found["notes"][0]
    assert "cv is a cross-validation: its scores are means over 2 folds, its costs their sums." in found["notes"]
    assert "cv against one" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "0.8500" in cli("compare", folds, runs[0]).out


def test_a_stage_that_a_fold_took_over_counts_once(runs: list[Path], folds: Path, cli: Cli) -> None:
    pretrain = {"state": "done", "started": "2026-01-02T03:04:05+00:00", "seconds": 100.0, "metrics": {}}
    for number in (1, 2):
        file = folds / f"fold-{number}" / "run.json"
        record = json.loads(file.read_text())
        record["stages"]["pretrain"] = pretrain
        file.write_text(json.dumps(record))
    assert cli("compare", folds, runs[0], "--json").json["runs"][0]["cost"]["seconds"] == 41 + 100


def test_folds_that_have_no_mean_yet_are_refused(runs: list[Path], folds: Path, cli: Cli) -> None:
    (folds / "crossval.json").write_text(json.dumps({"name": "animals", "folds": 2, "done": 1, "runs": []}))
    refused = cli("compare", folds, runs[0], "--json")
    assert (refused.code, refused.json["got"]) == (2, "1 of 2 folds done")
    (folds / "crossval.json").write_text(json.dumps({"folds": 2, "done": 2}))
    assert cli("compare", folds, runs[0]).code == 4


def test_a_section_that_only_one_run_has_is_not_listed_key_by_key(runs: list[Path], cli: Cli, tmp_path: Path) -> None:
    plain = variant(stages=["preprocess", "finetune", "evaluate"])
    del plain["freeze"]
    found = cli("compare", runs[0], make_run(tmp_path / "plain", recipe=plain), "--json").json
    assert list(found["recipe_differences"]) == ["stages"]


def test_runs_of_one_name_are_called_by_their_folders(runs: list[Path], cli: Cli, tmp_path: Path) -> None:
    named = make_run(tmp_path / "named", recipe=variant(name="other"))
    assert [run["name"] for run in cli("compare", *runs, "--json").json["runs"]] == ["one", "two"]
    assert [run["name"] for run in cli("compare", runs[0], named, "--json").json["runs"]] == ["animals", "other"]


def test_wrong_input(runs: list[Path], cli: Cli, tmp_path: Path) -> None:
    assert cli("compare").code == 2
    one = cli("compare", runs[0], "--json")
    assert (one.code, one.json["expected"]) == (2, "two runs or more")
    twice = cli("compare", runs[0], runs[1], runs[0], "--json")
    assert (twice.code, twice.json["what"]) == (2, "a run is given twice")
    assert cli("compare", runs[0], tmp_path / "nothing").code == 2
    page = cli("compare", *runs, "--html", tmp_path / "no" / "page.html", "--json")
    assert (page.code, page.json["hint"]) == (5, "choose another --html")
    (runs[1] / "evaluate" / "results.json").write_text('{"model": 3}')
    assert cli("compare", *runs).code == 4


def test_secrets_are_not_shown(runs: list[Path], cli: Cli, tmp_path: Path) -> None:
    secret = make_run(tmp_path / "secret", recipe=variant(data={"train": "https://me:hunter2@host/rows.jsonl"}))
    done = cli("compare", runs[0], secret)
    assert "host/rows.jsonl" in done.out
    assert "hunter2" not in done.out + cli("compare", runs[0], secret, "--json").out
