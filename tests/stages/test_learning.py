"""What finetune, evaluate and export promise of the weights: what is frozen stays, what is best is kept, what is
exported answers as the model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, write_rows
from safetensors.torch import load_file

from llmkit.run.log import read_metrics


@pytest.fixture
def finetune(cli: Cli, tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> Any:
    """Fine-tunes the tiny Llama on conversations with the settings given; its metrics, and the run at `.run`."""

    def run(*settings: str, command: str = "finetune") -> dict[str, Any]:
        options = [word for setting in ("data.eval=20%", "finetune.warmup=0", *settings) for word in ("--set", setting)]
        done = cli(command, "-m", tiny_llama, "-d", chat_rows, "-o", tmp_path / "run", "--json", "-q", *options)
        assert done.code == 0, done.out
        metrics: dict[str, Any] = done.json["metrics"]
        return metrics

    run.run = tmp_path / "run"  # type: ignore[attr-defined]
    return run


def record(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def eval_losses(run: Path) -> list[float]:
    return [line["eval_loss"] for line in read_metrics(run / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.parametrize(
    ("freeze", "frozen"),
    [
        ("{blocks: 0}", "model.layers.0."),
        ("{blocks: all, embeddings: true}", "model."),
        ("{head: true}", "lm_head."),
        ("{patterns: ['*q_proj*']}", "q_proj"),
    ],
)
def test_what_is_frozen_stays_bit_identical_and_the_rest_moves(
    freeze: str, frozen: str, finetune: Any, tiny_llama: Path
) -> None:
    finetune(f"freeze={freeze}", "finetune.steps=5", "finetune.lr=1e-2", "finetune.weight_decay=0.1")
    before, after = (
        load_file(tiny_llama / "model.safetensors"),
        load_file(finetune.run / "finetune/model/model.safetensors"),
    )
    plan = json.loads((finetune.run / "freeze" / "freeze.json").read_text())
    assert set(plan["frozen"]) | set(plan["trainable"]) == set(before) == set(after)
    assert {name for name in before if frozen in name and name != "model.norm.weight"} <= set(plan["frozen"])
    assert {name for name in before if torch.equal(before[name], after[name])} == set(plan["frozen"])


def test_the_default_rate_is_told_with_its_source(finetune: Any) -> None:
    finetune("finetune.steps=1")
    guess = record(finetune.run)["guesses"]["finetune.lr"]
    assert guess == {"value": 2e-5, "source": "the default for chat: the parent records no rate of its own"}


def test_a_rate_that_was_given_is_no_guess(finetune: Any) -> None:
    finetune("finetune.steps=1", "finetune.lr=3e-4")
    assert "finetune.lr" not in record(finetune.run)["guesses"]
    assert json.loads((finetune.run / "finetune/model/llmkit.json").read_text())["peak_lr"] == 3e-4


def test_a_model_that_llmkit_trained_hands_its_rate_on(
    finetune: Any, cli: Cli, chat_rows: Path, tmp_path: Path
) -> None:
    finetune("finetune.steps=1", "finetune.lr=3e-4")
    child = tmp_path / "child"
    done = cli(
        "finetune", "-m", finetune.run / "finetune/model", "-d", chat_rows, "-o", child, "--set", "finetune.steps=1"
    )
    assert done.code == 0, done.err
    assert record(child)["guesses"]["finetune.lr"]["value"] == pytest.approx(3e-5)
    assert "the parent's peak rate 0.0003 times lr_scale 0.1" in done.err


def test_early_stopping_stops(finetune: Any) -> None:
    metrics = finetune(
        "finetune.steps=40",
        "finetune.lr=1",
        "finetune.schedule=constant",
        "finetune.eval_every=1",
        "finetune.early_stopping={patience: 3}",
    )
    losses = eval_losses(finetune.run)
    assert metrics["steps"] == len(losses) < 40
    assert min(losses[-3:]) >= min(losses[:-3])
    assert metrics["best_step"] == metrics["steps"] - 3


@pytest.mark.parametrize("keep", ["best", "last"])
def test_the_weights_that_are_asked_for_become_the_model(keep: str, finetune: Any) -> None:
    metrics = finetune(
        "finetune.steps=6",
        "finetune.lr=0.5",
        "finetune.schedule=constant",
        "finetune.eval_every=1",
        f"finetune.keep={keep}",
        "finetune.precision=fp32",
        "evaluate.precision=fp32",
    )
    losses = eval_losses(finetune.run)
    assert losses[-1] != min(losses)
    expected = min(losses) if keep == "best" else losses[-1]
    assert metrics["eval_loss"] == expected
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_training_teaches(finetune: Any) -> None:
    metrics = finetune("finetune.steps=40", "finetune.lr=1e-2", "evaluate.generate=4", command="run")
    scores = metrics["evaluate"]
    assert scores["model.loss"] < 0.6 * scores["parent.loss"]
    assert scores["model.token_accuracy"] > scores["parent.token_accuracy"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_what_is_exported_loads_with_transformers_and_answers_as_the_model(dtype: str, finetune: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finetune("finetune.steps=2", "evaluate.generate=0", f"export.dtype={dtype}", command="run")
    folder = finetune.run / "export" / "transformers"
    kind = torch.float32 if dtype == "auto" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(finetune.run / "finetune" / "model", dtype=kind).eval()
    exported = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert exported.dtype == kind
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    inputs = tokenizer("The apple is river and the stone is near item 3.", return_tensors="pt")
    with torch.inference_mode():
        ours, theirs = (
            m(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits for m in (model, exported)
        )
    assert torch.equal(ours, theirs)
    assert not [file for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


def test_a_classifier_goes_through_all_stages(cli: Cli, tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    words = {"a": "apple apple", "b": "river river", "c": "stone stone"}
    rows = ({"text": f"{words['abc'[i % 3]]} {i}", "label": "abc"[i % 3]} for i in range(60))
    label_rows = write_rows(tmp_path / "labels.jsonl", rows)

    run = tmp_path / "run"
    settings = ["freeze.embeddings=true", "finetune.steps=40", "finetune.lr=1e-2", "data.eval=20%", "finetune.warmup=0"]
    options = [word for setting in settings for word in ("--set", setting)]
    done = cli("run", "-m", tiny_bert, "-d", label_rows, "-o", run, "--json", "-q", *options)
    assert done.code == 0, done.out
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert list(results["model"])[:5] == ["loss", "accuracy", "precision", "recall", "f1"]
    assert results["model"]["loss"] < results["parent"]["loss"]
    assert set(results["tables"]["model"]) >= {"confusion_matrix"}
    model = AutoModelForSequenceClassification.from_pretrained(run / "export" / "transformers")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    before = load_file(tiny_bert / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert torch.equal(before, model.bert.embeddings.word_embeddings.weight)
    assert not torch.equal(
        load_file(tiny_bert / "model.safetensors")["encoder.layer.0.output.dense.weight"],
        model.bert.encoder.layer[0].output.dense.weight,
    )
    assert {"accuracy", "f1", "train_loss"} <= set(done.json["metrics"]["finetune"])


SCRATCH = """\
name: scratch
task: text
stages: [preprocess, pretrain, evaluate, export]
data: {train: DATA, eval: 20%, max_length: 32}
pretrain:
  architecture: {model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 32, n_positions: 64}
  tokenizer: {train: KIND, vocab_size: 300}
  steps: 20
  lr: 1e-2
"""


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_a_model_from_nothing_with_its_own_tokenizer(kind: str, cli: Cli, text_rows: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    recipe = tmp_path / "scratch.yaml"
    recipe.write_text(SCRATCH.replace("DATA", str(text_rows)).replace("KIND", kind))
    done = cli("run", recipe, "-o", tmp_path / "run", "--json", "-q")
    assert done.code == 0, done.out
    results = json.loads((tmp_path / "run" / "evaluate" / "results.json").read_text())
    assert list(results["model"]) == ["loss", "perplexity", "bits_per_byte"]
    assert "parent" not in results
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export" / "transformers")
    text = "The apple is wörld and 7 不 items."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    answered = cli("generate", tmp_path / "run", "The apple", "--raw", "--max-new-tokens", "5", "--json")
    assert answered.code == 0, answered.out
    assert answered.json["answer"]


def test_text_goes_on_from_a_pretrained_model(cli: Cli, tiny_llama: Path, text_rows: Path, tmp_path: Path) -> None:
    done = cli(
        "run", "-m", tiny_llama, "-d", text_rows, "-o", tmp_path / "run", "--json", "-q", "--set", "finetune.steps=3"
    )
    assert done.code == 0, done.out
    assert {"model.bits_per_byte", "parent.bits_per_byte"} <= set(done.json["metrics"]["evaluate"])
