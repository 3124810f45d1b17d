"""Scores of classification against scikit-learn's functions, called by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring import corpus_of, scoring_of, sentence, tokenizer_of
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_score, recall_score
from transformers import AutoModelForSequenceClassification

from llmkit.errors import DataError
from llmkit.metrics.classification import classification_tables
from llmkit.metrics.statistic import Predictions
from llmkit.metrics.text import rouge_l
from llmkit.tasks.base import Encoded, TaskSettings
from llmkit.tasks.classify import ClassifyTask
from llmkit.tasks.scoring import statistics_of

LABELS = ("bird", "fish", "stone")
ROWS = [{"text": sentence(i) * (1 + i % 3), "label": LABELS[i % 5 % 3]} for i in range(23)]


@pytest.fixture(params=["tiny_bert", "tiny_llama"])
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def task(folder: Path) -> ClassifyTask:
    return ClassifyTask(tokenizer_of(folder), TaskSettings(64, labels=LABELS))


@pytest.fixture
def model(folder: Path, task: ClassifyTask) -> Any:
    from transformers import AutoConfig

    torch.manual_seed(2)
    changes = task.model_changes(AutoConfig.from_pretrained(folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder, **changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    assert model.config.id2label == dict(enumerate(LABELS))
    return model


def test_scores_are_those_by_hand(task: ClassifyTask, model: Any, tmp_path: Path) -> None:
    corpus = corpus_of(task, tmp_path / "corpus", ROWS)
    predicted, losses = [], []
    for row in ROWS:
        ids = torch.tensor([task.tokenizer(row["text"])["input_ids"][:64]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        predicted.append(LABELS[int(logits.argmax())])
        losses.append(-logits.log_softmax(-1)[LABELS.index(row["label"])].item())
    actual = [row["label"] for row in ROWS]
    assert len(set(predicted)) > 1
    average: dict[str, Any] = {"average": "macro", "zero_division": 0}
    expected = {
        "loss": np.mean(losses),
        "accuracy": accuracy_score(actual, predicted),
        "precision": precision_score(actual, predicted, **average),
        "recall": recall_score(actual, predicted, **average),
        "f1": f1_score(actual, predicted, **average),
    }
    for size in (1, 4, 100):
        done: list[int] = []
        scores = task.evaluate(model, corpus, scoring_of(task, batch_size=size, samples=23, advance=done.append))
        assert {name: scores.metrics[name] for name in expected} == pytest.approx(expected, abs=1e-5)
        assert [sample["answer"] for sample in scores.samples] == predicted
        assert [sample["reference"] for sample in scores.samples] == actual
        assert scores.tables["confusion_matrix"] == confusion_matrix(actual, predicted, labels=LABELS).tolist()
        assert sum(done) == task.work(corpus, scoring_of(task)) == 23


def test_the_training_loss_is_the_sum(task: ClassifyTask, model: Any, tmp_path: Path) -> None:
    corpus = corpus_of(task, tmp_path / "corpus", ROWS)
    objective = task.objective(model)
    assert objective.padded
    with objective.computing():
        alone = [objective.loss(model, objective.collate([corpus[i]])).item() for i in range(6)]
        batch = objective.collate([corpus[i] for i in range(6)])
        assert objective.count(batch) == 6
        assert not batch["attention_mask"].all(), "there is padding"
        assert objective.loss(model, batch).item() == pytest.approx(sum(alone), rel=1e-5)


def test_rows_are_cut_counted_or_refused(task: ClassifyTask) -> None:
    long, unknown, good = task.encode(
        [{"text": "stone " * 200, "label": "bird"}, {"text": "x", "label": "tree"}, {"text": "x", "label": "stone"}]
    )
    assert isinstance(long, Encoded)
    assert isinstance(good, Encoded)
    assert len(long.examples[0]["input_ids"]) == 64
    assert long.lost_tokens == len(task.tokenizer("stone " * 200)["input_ids"]) - 64
    assert unknown == "label `tree` is not among the labels of the training data"
    assert (good.examples[0]["label"], good.lost_tokens) == (2, 0)


def test_a_text_without_a_token_is_refused(task: ClassifyTask) -> None:
    from tokenizers import normalizers

    task.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    assert task.encode([{"text": "\u200b", "label": "bird"}]) == ["text has no token"]


@pytest.mark.parametrize("labels", [(), ("one",)])
def test_fewer_than_two_labels_are_no_classes(tiny_bert: Path, labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="two labels or more"):
        ClassifyTask(tokenizer_of(tiny_bert), TaskSettings(64, labels=labels))


def test_scores_when_labels_are_missing_on_one_side() -> None:
    actual, predicted = np.array([0, 0, 1, 1, 1]), np.array([0, 2, 1, 1, 0])
    names = ("accuracy", "precision", "recall", "f1")
    fields = {"actual": actual, "predicted": predicted}
    _, scores, _ = statistics_of(names, Predictions(fields, np.arange(5), ("a", "b", "c", "d")))
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["precision"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert scores["recall"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert scores["f1"] == pytest.approx((1 / 2 + 0.8 + 0) / 3)
    tables = classification_tables(actual, predicted, ["a", "b", "c", "d"])
    assert tables["confusion_matrix"] == [[1, 0, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert sorted(tables["by_label"]) == ["a", "b", "c"]
    assert tables["by_label"]["b"] == {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": 0.8, "examples": 3}


def test_rouge_l() -> None:
    assert rouge_l(["the cat sat"], ["the cat sat"]) == 1.0
    assert rouge_l(["the cat sat", "dogs run"], ["the cat", "birds"]) == pytest.approx((2 * 1 * (2 / 3) / (5 / 3)) / 2)
    assert rouge_l(["running dogs"], ["run dog"]) == 1.0, "stems"
