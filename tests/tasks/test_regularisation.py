"""Label smoothing and noisy embeddings: in training, as their papers say, and never when evaluating."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scoring import corpus_of, scoring_of, sentence, tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from llmkit.data.corpus import Corpus
from llmkit.model.packing import pack
from llmkit.tasks.base import Regularisation, TaskSettings, embedding_noise
from llmkit.tasks.classify import ClassifyTask
from llmkit.tasks.text import TextTask

LABELS = ("bird", "fish", "stone")


def strong(model: Any) -> Any:
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture
def text(tiny_llama: Path, tmp_path: Path) -> tuple[TextTask, Any, Corpus]:
    task = TextTask(tokenizer_of(tiny_llama), TaskSettings(64))
    corpus = corpus_of(task, tmp_path / "corpus", [{"text": sentence(i) * (1 + i % 3)} for i in range(5)])
    return task, strong(AutoModelForCausalLM.from_pretrained(tiny_llama)), corpus


def labelled(folder: Path, tmp_path: Path) -> tuple[ClassifyTask, Any, Corpus]:
    task = ClassifyTask(tokenizer_of(folder), TaskSettings(64, labels=LABELS))
    changes = task.model_changes(AutoConfig.from_pretrained(folder))
    model = strong(AutoModelForSequenceClassification.from_pretrained(folder, **changes))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = [{"text": sentence(i) * (1 + i % 3), "label": LABELS[i % 3]} for i in range(6)]
    return task, model, corpus_of(task, tmp_path / "corpus", rows)


def loss_of(task: Any, model: Any, corpus: Corpus, regularisation: Regularisation, *, training: bool) -> float:
    objective = task.objective(model, regularisation)
    model.train(training)
    batch = objective.collate([corpus[i] for i in range(len(corpus))])
    torch.manual_seed(1)
    with objective.computing(), torch.no_grad():
        return float(objective.loss(model, batch))


def test_smoothing_of_tokens_is_that_of_pytorch(text: tuple[TextTask, Any, Corpus]) -> None:
    task, model, corpus = text
    model.eval()
    plain = smooth = 0.0
    for example in corpus:
        ids = torch.from_numpy(np.asarray(example["input_ids"], np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        plain += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        smooth += F.cross_entropy(logits, ids[1:], reduction="sum", label_smoothing=0.3).item()
    rule = Regularisation(label_smoothing=0.3)
    assert loss_of(task, model, corpus, rule, training=True) == pytest.approx(smooth, rel=1e-5)
    assert loss_of(task, model, corpus, rule, training=False) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("folder", ["tiny_bert", "tiny_llama"])
def test_smoothing_of_labels_is_that_of_pytorch(folder: str, request: Any, tmp_path: Path) -> None:
    task, model, corpus = labelled(request.getfixturevalue(folder), tmp_path)
    model.eval()
    ids = [torch.from_numpy(np.asarray(example["input_ids"], np.int64))[None] for example in corpus]
    with torch.no_grad():
        logits = torch.cat([model(row).logits for row in ids])
    labels = torch.tensor([int(example["label"]) for example in corpus])
    rule = Regularisation(label_smoothing=0.3)
    for training, share in ((True, 0.3), (False, 0.0)):
        expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=share).item()
        assert loss_of(task, model, corpus, rule, training=training) == pytest.approx(expected, rel=1e-5)


def test_noise_is_bounded_by_the_length_of_each_example(text: tuple[TextTask, Any, Corpus]) -> None:
    task, model, corpus = text
    rows = [np.asarray(corpus[i]["input_ids"], np.int64) for i in range(5)]
    packed: dict[str, Any] = pack(rows, share=False).inputs()
    padded = task.padded([corpus[i] for i in range(5)])
    embed = model.get_input_embeddings()
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) > 2
    for batch in (packed, padded):
        batch["lengths"] = torch.tensor(lengths)

    def noise_of(batch: dict[str, Any]) -> torch.Tensor:
        with embedding_noise(model, batch, 7.0):
            noisy = embed(batch["input_ids"])
        return (noisy - embed(batch["input_ids"])).detach()

    noise = noise_of(packed)[0]
    for length, part in zip(lengths, noise.split(lengths), strict=True):
        reach = 7.0 / (length * 32) ** 0.5
        assert 0.9 * reach < part.abs().max() <= reach * (1 + 1e-5)
        assert abs(part.mean()) < 0.2 * reach, "uniform around zero"
        assert part.std() == pytest.approx(reach / 3**0.5, rel=0.1)
    noise = noise_of(padded)
    for length, part in zip(lengths, noise, strict=True):
        assert 0.9 * 7.0 / (length * 32) ** 0.5 < part.abs().max() <= 7.0 / (length * 32) ** 0.5 * (1 + 1e-5)


def test_noise_of_no_size_changes_nothing_and_is_absent_from_evaluation(text: tuple[TextTask, Any, Corpus]) -> None:
    task, model, corpus = text
    plain = loss_of(task, model, corpus, Regularisation(), training=True)
    noisy = Regularisation(neftune_alpha=5.0)
    assert loss_of(task, model, corpus, Regularisation(neftune_alpha=1e-9), training=True) == pytest.approx(plain)
    assert loss_of(task, model, corpus, noisy, training=True) != pytest.approx(plain, rel=1e-4)
    assert loss_of(task, model, corpus, noisy, training=False) == pytest.approx(plain, rel=1e-6)
    model.eval()
    before = task.evaluate(model, corpus, scoring_of(task)).metrics
    assert task.evaluate(model, corpus, scoring_of(task)).metrics == before


@pytest.mark.parametrize("folder", ["tiny_bert", "tiny_llama"])
def test_noise_of_no_size_changes_no_label_either(folder: str, request: Any, tmp_path: Path) -> None:
    """A decoder finds a text's last token by its ids, which must not go missing when embeddings are given."""
    task, model, corpus = labelled(request.getfixturevalue(folder), tmp_path)
    plain = loss_of(task, model, corpus, Regularisation(), training=True)
    found = loss_of(task, model, corpus, Regularisation(neftune_alpha=1e-9), training=True)
    assert found == pytest.approx(plain, rel=1e-5)
    noisy = Regularisation(neftune_alpha=5.0)
    assert loss_of(task, model, corpus, noisy, training=True) != pytest.approx(plain, rel=1e-4)
    assert loss_of(task, model, corpus, noisy, training=False) == pytest.approx(plain, rel=1e-6)


def test_noise_lets_embeddings_learn(text: tuple[TextTask, Any, Corpus]) -> None:
    task, model, corpus = text
    objective = task.objective(model, Regularisation(neftune_alpha=5.0))
    model.train()
    with objective.computing():
        objective.loss(model, objective.collate([corpus[0]])).backward()
    assert model.get_input_embeddings().weight.grad.to_dense().abs().max() > 0
