"""evaluate: slices, further data and the gaps to them, documents, classifiers, metrics of one's own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Cli, sentence, write_rows
from evaluating import Bench, bench, chats, classifier, labelled, other_llama, own_cache  # noqa: F401

from llmkit.metrics.bootstrap import Bootstrap
from llmkit.metrics.statistic import ratio_of
from llmkit.recipe.load import load_recipe
from llmkit.run.directory import Run
from llmkit.stages.against import others
from llmkit.stages.evaluate import _data as evaluate_data
from llmkit.stages.slices import _as_slices


def test_slices(bench: Bench, tiny_llama: Path, other_llama: Path, chats: Path) -> None:
    slices = ("--set", "evaluate.slices=[topic, length, source, size]")
    bench(tiny_llama, "--data", chats, "--against", other_llama, "--set", "evaluate.generate=0", *slices)
    lines, rows = bench.predictions(), [json.loads(line) for line in chats.read_text().splitlines()]
    found = bench.results["slices"]
    assert [(part["by"], part["value"]) for part in found if part["by"] in ("topic", "source")] == [
        *(("topic", topic) for topic in "xyz"),
        ("source", str(chats)),
    ]
    for by in ("topic", "length", "size", "source"):
        assert sum(part["examples"] for part in found if part["by"] == by) == 40
    for part in (part for part in found if part["by"] == "topic"):
        mine = [line for line in lines if rows[line["source"]["line"] - 1]["topic"] == part["value"]]
        for who in ("model", "other"):
            loss, tokens = (sum(line[who][name] for line in mine) for name in ("loss", "tokens"))
            assert part[who]["loss"] == pytest.approx(loss / tokens)
            low, high = part["intervals"][who]["loss"]
            assert low < part[who]["loss"] < high
        assert "loss" in part["differences"]["other"]
    lengths = [part for part in found if part["by"] == "length"]
    assert 2 <= len(lengths) <= 4
    least = min(line["length"] for line in lines)
    assert lengths[0]["value"].startswith(f"{least}-")
    assert lengths[0]["value"].endswith(" tokens")
    assert [part["value"] for part in found if part["by"] == "size"] == ["0-4.5", "5-9.5", "10-14.5", "15-19.5"]


def test_other_data_and_the_gaps(bench: Bench, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} and {n + 1}?", "completion": str(2 * n + 1)} for n in range(30)]
    sums = write_rows(tmp_path / "sums.jsonl", rows)
    done = bench(
        tiny_llama, "--data", chats, "--set", f"evaluate.data_sets.sums={sums}", "--set", "evaluate.generate=4"
    )
    results = bench.results
    assert results["data_sets"]["sums"]["examples"] == 30
    (gap,) = [gap for gap in results["gaps"] if gap["metric"] == "loss"]
    assert (gap["kind"], gap["from"], gap["to"], gap["who"]) == ("domain", "held_out", "sums", "model")
    assert gap["gap"] == pytest.approx(results["data_sets"]["sums"]["model"]["loss"] - results["model"]["loss"])
    assert gap["low"] < gap["gap"] < gap["high"]
    assert len(bench.predictions("predictions-sums")) == 30
    assert results["data_sets"]["sums"]["model"].keys() == results["model"].keys()
    assert "domain: held_out to sums" in done.out


def test_the_gap_to_what_was_learnt(cli: Cli, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    settings = ("data.eval=25%", "finetune.steps=30", "finetune.lr=1e-2", "finetune.warmup=0", "evaluate.generate=0")
    options = [word for setting in settings for word in ("--set", setting)]
    done = cli("run", "-m", tiny_llama, "-d", chats, "-o", tmp_path / "run", *options, "--json", "-q")
    assert done.code == 0, done.out
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert results["data_sets"]["train"]["examples"] == results["examples"]
    assert set(results["data_sets"]["train"]) >= {"model", "intervals"}
    assert "parent" not in results["data_sets"]["train"]
    (gap,) = [gap for gap in results["gaps"] if gap["metric"] == "loss"]
    assert (gap["kind"], gap["from"], gap["to"]) == ("over-fitting", "train", "held_out")
    assert gap["gap"] > 0
    metrics = done.json["metrics"]["evaluate"]
    assert metrics["intervals"]["model"]["loss"] == results["intervals"]["model"]["loss"]
    assert metrics["gaps"] == results["gaps"]
    told = cli("evaluate", tmp_path / "run", "--set", "evaluate.train_sample=0", "--json", "-q")
    assert told.code == 0, told.out
    assert "gaps" not in told.json["metrics"]


def test_a_run_is_scored_on_other_data_against_its_parent(
    cli: Cli, bench: Bench, tiny_llama: Path, chats: Path, chat_rows: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    settings = ("--set", "finetune.steps=2", "--set", "data.max_length=90")
    done = cli("finetune", "-m", tiny_llama, "-d", chats, "-o", trained, *settings)
    assert done.code == 0, done.err
    before = (trained / "recipe.yaml").read_text()
    bench(trained, "--data", chat_rows, "--set", "evaluate.generate=0")
    assert bench.results["models"] == ["model", "other"]
    assert bench.results["examples"] == 60
    assert bench.results["model"]["loss"] != bench.results["other"]["loss"]
    assert "max_length: 90" in (bench.run / "recipe.yaml").read_text()
    assert (trained / "recipe.yaml").read_text() == before


def test_documents_count_as_one(bench: Bench, tiny_llama: Path, tmp_path: Path) -> None:
    """The interval is of documents, though windows are scored."""
    rows = ({"text": " ".join(sentence(i % 4 + 50 * n) for n in range(6))} for i in range(12))
    texts = write_rows(tmp_path / "texts.jsonl", rows)
    bench(tiny_llama, "--data", texts, "--set", "data.max_length=24", "--set", "data.leaks=off")
    lines = bench.predictions()
    documents = {line["source"]["line"] for line in lines}
    assert len(lines) > 3 * len(documents)
    assert set(bench.results["model"]) == {"loss", "perplexity", "bits_per_byte"}
    assert all({"loss", "tokens", "bytes"} <= line["model"].keys() for line in lines)
    assert lines[0]["text"]
    loss, tokens = (np.array([line["model"][name] for line in lines]) for name in ("loss", "tokens"))
    of_document = np.unique([line["source"]["line"] for line in lines], return_inverse=True)[1]

    def interval(groups: np.ndarray) -> Any:
        plan = Bootstrap(groups, 0, 4000)
        return plan.draw({("m", "x"): ratio_of(np.arange(len(lines)), loss, tokens)}).interval(("m", "x"))

    together, apart = interval(of_document), interval(np.arange(len(lines)))
    low, high = bench.results["intervals"]["model"]["loss"]
    width = together.high - together.low
    assert high - low == pytest.approx(width, rel=0.1)
    assert abs(apart.high - apart.low - width) > 0.2 * width, "windows alone would say something else"


def test_rows_of_a_group_are_drawn_together(cli: Cli, tiny_llama: Path, tmp_path: Path, own_cache: None) -> None:
    rows = ({"text": sentence(i) + f" number {i}", "author": f"a{i % 24}"} for i in range(240))
    data, run = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    settings = ("data.group=author", "data.leaks=off", "evaluate.precision=fp32", "evaluate.slices=[author]")
    words = [word for setting in settings for word in ("--set", setting)]
    words += ["--set", "data.eval=40%", "--set", "stages=[preprocess, evaluate]", "--set", "evaluate.train_sample=0"]
    done = cli("run", "-m", tiny_llama, "-d", data, "--task", "text", "-o", run, *words)
    assert done.code == 0, done.err
    recipe, opened = load_recipe(run / "recipe.yaml", []), Run.peek(run, "run")
    held_out = evaluate_data(recipe, opened)["held_out"]
    authors = [part["value"] for part in json.loads((run / "evaluate/results.json").read_text())["slices"]]
    assert len(held_out.corpus) > 3 * len(authors) > 10
    assert len(set(held_out.groups().tolist())) == len(authors)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_number_that_is_missing_is_in_a_slice_of_its_own(missing: Any) -> None:
    found = _as_slices([*map(float, range(40)), missing])
    assert found[-1] == "(none)"
    assert len(set(found)) == 5


def test_a_model_does_not_take_the_place_of_what_an_example_says() -> None:
    uris = [f"runs/{name}/finetune/model" for name in ("text", "prompt", "fine")]
    recipe: Any = SimpleNamespace(evaluate=SimpleNamespace(models=uris), model=None)
    assert not {"text", "prompt"} & set(others(recipe))


def test_a_classifier_by_itself(bench: Bench, classifier: Path, tmp_path: Path) -> None:
    bench(classifier, "--data", labelled(tmp_path / "rows.jsonl", "abc"), "--set", "evaluate.slices=[label]")
    lines, results = bench.predictions(), bench.results
    right = np.mean([line["model"]["label"] == line["reference"] for line in lines])
    assert results["model"]["accuracy"] == pytest.approx(right)
    assert results["model"]["loss"] == pytest.approx(
        -np.mean([math.log(line["model"]["probabilities"][line["reference"]]) for line in lines])
    )
    for line in lines:
        probabilities = line["model"]["probabilities"]
        assert sum(probabilities.values()) == pytest.approx(1)
        assert max(probabilities.values()) == probabilities[line["model"]["label"]] == line["model"]["probability"]
    assert results["tables"]["model"]["calibration"]["temperature"] > 0
    assert "cross-fitted" in results["tables"]["model"]["calibration"]["fitted_on"]
    for part in results["slices"]:
        assert "the same label" in part["reasons"]["model"]["roc_auc"]


def test_one_label_only_has_no_curve_and_says_so(bench: Bench, classifier: Path, tmp_path: Path) -> None:
    done = bench(classifier, "--data", labelled(tmp_path / "rows.jsonl", "b"))
    assert "roc_auc" not in bench.results["model"]
    assert "the same label" in bench.results["reasons"]["model"]["roc_auc"]
    assert "roc_auc: all examples have the same label" in done.out


def test_a_metric_of_ones_own(bench: Bench, classifier: Path, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "def near(references, predictions):\n"
        "    return [1.0 - abs(ord(r) - ord(p)) / 2 for r, p in zip(references, predictions)]\n"
    )
    given = (classifier, "--data", labelled(tmp_path / "rows.jsonl", "abc"))
    bench(*given, "--set", f"evaluate.metrics=[accuracy, '{own}:near']")
    found = bench.results["model"]["mine.py:near"]
    lines = bench.predictions()
    expected = np.mean([1 - abs(ord(line["reference"]) - ord(line["model"]["label"])) / 2 for line in lines])
    assert found == pytest.approx(expected)
    low, high = bench.results["intervals"]["model"]["mine.py:near"]
    assert low < found < high
    own.write_text("def near(references, predictions):\n    return 0.25\n")
    bench(*given, "--set", f"evaluate.metrics=[accuracy, '{own}:near']")
    assert bench.results["model"]["mine.py:near"] == 0.25
    assert "no interval" in bench.results["reasons"]["model"]["mine.py:near"]


def test_without_resamples_there_are_scores_alone(
    bench: Bench, tiny_llama: Path, other_llama: Path, chats: Path
) -> None:
    none = ("--set", "evaluate.resamples=0", "--set", "evaluate.generate=0")
    done = bench(tiny_llama, "--data", chats, "--against", other_llama, *none)
    assert (bench.results["intervals"], bench.results["differences"]) == ({}, {})
    assert bench.results["other"]["loss"] > 0
    assert "other" in done.out
