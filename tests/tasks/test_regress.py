"""Numbers as targets: what is learnt is the squared error, and scores are those by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, write_rows
from scoring import corpus_of, scoring_of, sentence, tokenizer_of
from transformers import AutoModelForSequenceClassification

from llmkit.data.readers import Row, Where
from llmkit.data.rows import choose_format, convert
from llmkit.errors import DataError
from llmkit.tasks.base import TaskSettings
from llmkit.tasks.regress import RegressTask

ROWS = [{"text": sentence(i) * (1 + i % 3), "number": i / 4 - 2} for i in range(17)]


@pytest.fixture
def task(tiny_bert: Path) -> RegressTask:
    return RegressTask(tokenizer_of(tiny_bert), TaskSettings(64))


def test_scores_and_loss_are_those_by_hand(task: RegressTask, tiny_bert: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    changes = task.model_changes(None)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **changes).eval()
    corpus = corpus_of(task, tmp_path / "corpus", ROWS)
    said = []
    for row in ROWS:
        ids = torch.tensor([task.tokenizer(row["text"])["input_ids"][:64]])
        with torch.no_grad():
            said.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
    target = np.array([row["number"] for row in ROWS])
    for size in (1, 5, 50):
        scores = task.evaluate(model, corpus, scoring_of(task, batch_size=size, samples=2))
        assert scores.metrics["loss"] == pytest.approx(np.mean((target - said) ** 2), rel=1e-4)
        assert scores.metrics["mae"] == pytest.approx(np.mean(np.abs(target - said)), rel=1e-4)
        assert set(scores.metrics) == set(task.metrics)
        assert [sample["reference"] for sample in scores.samples] == ["-2", "2"]
    objective = task.objective(model)
    with objective.computing(), torch.no_grad():
        summed = objective.loss(model, objective.collate([corpus[i] for i in range(len(corpus))])).item()
    assert summed == pytest.approx(np.sum((target - said) ** 2), rel=1e-4)


def test_numbers_are_learnt(cli: Cli, tiny_bert: Path, tmp_path: Path) -> None:
    rows = ({"text": "apple " * (i % 5) + sentence(i), "score": float(i % 5)} for i in range(60))
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = (
        "finetune.steps=60",
        "finetune.lr=1e-2",
        "finetune.warmup=0",
        "data.eval=20%",
        "finetune.precision=fp32",
    )
    options = [word for setting in settings for word in ("--set", setting)]
    run = tmp_path / "run"
    done = cli("run", "-m", tiny_bert, "-d", data, "-t", "regress", "-o", run, *options, "--json", "-q")
    assert done.code == 0, done.out
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert results["model"]["rmse"] < 0.7 * results["parent"]["rmse"]
    assert results["model"]["r2"] > 0.3
    low, high = results["intervals"]["model"]["spearman"]
    assert low < results["model"]["spearman"] < high
    assert {"loss", "predicted"} == set(
        json.loads((run / "evaluate" / "predictions.jsonl").read_text().splitlines()[0])["model"]
    )
    model = AutoModelForSequenceClassification.from_pretrained(run / "export" / "transformers")
    assert (model.config.num_labels, model.config.problem_type) == (1, "regression")


@pytest.mark.parametrize(("value", "found"), [(3, 3.0), (2.5, 2.5), ("-1e2", -100.0), (0, 0.0)])
def test_a_number_may_be_written_in_several_ways(value: Any, found: float) -> None:
    row = Row({"text": "x", "rating": value}, Where("rows.jsonl", 1))
    fmt = choose_format([row], "numbered", name=None, columns=None, where="rows.jsonl")
    assert convert(row, fmt) == {"text": "x", "number": found}


@pytest.mark.parametrize("value", [True, None, [1], "much", "nan", float("inf")])
def test_what_is_no_number_is_refused_with_the_reason(value: Any) -> None:
    good, bad = (Row({"text": "x", "score": each}, Where("rows.jsonl", n)) for n, each in enumerate((1, value)))
    fmt = choose_format([good], "numbered", name=None, columns=None, where="rows.jsonl")
    found: Any = convert(bad, fmt)
    assert "score" in found.reason or "number" in found.reason


def test_rows_without_numbers_do_not_fit() -> None:
    row = Row({"text": "x"}, Where("rows.jsonl", 1))
    with pytest.raises(DataError):
        choose_format([row], "numbered", name=None, columns=None, where="rows.jsonl")
