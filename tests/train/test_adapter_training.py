"""Training with adapters: nothing else moves, losses are those of the plain model, and a killed training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import (
    Recorder,
    check,
    facts_of,
    gradients,
    gradients_by_hand,
    log_of,
    logged,
    make_fit,
    moments_of,
    one_thread,
    random_corpus,
    same_bits,
    tiny_model,
    weights_of,
)
from killing import KilledError, kill
from knowing import classifier, classify_task, frozen, labelled_corpus, with_known
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from llmkit.data.corpus import Corpus
from llmkit.model.adapters import WEIGHTS, AdapterRules, add_adapters, merged, save_adapter
from llmkit.model.prefix import frozen_prefix
from llmkit.model.quantized import quantized_layers
from llmkit.train.loop import Fit

_one_thread = pytest.fixture(autouse=True)(one_thread)
IDS = torch.tensor([[5, 9, 3, 17, 8, 2], [7, 4, 11, 6, 3, 2]])


def build(family: str) -> PreTrainedModel:
    """A causal model whose output embeddings are its input embeddings, or a classifier of three labels."""
    return classifier("bert") if family == "bert" else tiny_model(family, tie_word_embeddings=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def without_adapters(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer.", "."): w for name, w in weights.items() if ".lora_" not in name}


@pytest.fixture
def corpora(tmp_path: Path) -> Callable[[str], tuple[Corpus, Corpus]]:
    def make(family: str) -> tuple[Corpus, Corpus]:
        folder = tmp_path / f"corpora-{family}"
        folder.mkdir(exist_ok=True)
        if family == "bert":
            return labelled_corpus(folder / "train", 45), labelled_corpus(folder / "eval", 12)
        return random_corpus(folder / "train", 45), random_corpus(folder / "eval", 12, seed=9)

    return make


@pytest.fixture
def build_fit(tmp_path: Path, corpora: Callable[[str], tuple[Corpus, Corpus]]) -> Callable[..., Fit]:
    """A Fit over a model with adapters; `rules` are theirs, `depth` the blocks that stand still."""

    def make(name: str, family: str = "llama", depth: int = 0, rules: Any = None, **given: Any) -> Fit:
        model = build(family)
        if depth:
            frozen(model, depth)
        still = [name for name, p in model.named_parameters() if not p.requires_grad]
        torch.manual_seed(4)
        add_adapters(model, AdapterRules(**({"rank": 4} | (rules or {}))), still)
        task = classify_task() if family == "bert" else None
        train, held_out = corpora(family)
        return make_fit(tmp_path / name, train, held_out, model=model, task=task, **({"steps": 6, "lr": 1e-2} | given))

    return make


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("family", "kind"), [("llama", "dora"), ("gpt2", "lora"), ("bert", "rslora")])
def test_training_moves_adapters_and_new_heads_alone(
    family: str, kind: str, precision: str, build_fit: Callable[..., Fit]
) -> None:
    fit = build_fit("fit", family, rules={"name": kind}, precision=precision, weight_decay=0.1)
    learning = set(trainable(fit.model))
    before = weights_of(fit)
    fit.run([])
    after = weights_of(fit)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == learning
    head = {"classifier.weight", "classifier.bias"} if family == "bert" else set()
    assert {name for name in moved if ".lora_" not in name} == head
    base = {name: p.detach() for name, p in build(family).named_parameters() if name not in head}
    still = {name: w for name, w in without_adapters(after).items() if name not in head}
    assert same_bits(still, base), "as they were before adapters came"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_training_moves_no_code_and_no_scale_of_four_bits(
    family: str, precision: str, build_fit: Callable[..., Fit]
) -> None:
    fit = build_fit("fit", family, rules={"name": "qlora"}, precision=precision, weight_decay=0.1, eval_every=2)
    before = weights_of(fit) | {name: buffer.clone() for name, buffer in fit.model.named_buffers()}
    fit.run([])
    after = weights_of(fit) | dict(fit.model.named_buffers())
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(trainable(fit.model))
    parent = {name: p.detach() for name, p in build(family).named_parameters()}
    with fit.masters.in_full() as model, merged(model) as weights:
        moved = {name for name, tensor in parent.items() if not torch.equal(weights[name], tensor)}
        layers = {path.removesuffix(".base_layer") + ".weight" for path in quantized_layers(model)}
        assert moved == layers | {name for name in trainable(model) if ".lora_" not in name}
        expected = logits(model.eval())
        other = build(family).eval()
        other.load_state_dict(weights)
    torch.testing.assert_close(logits(other), expected, atol=1e-5, rtol=0)


def test_the_optimizer_keeps_state_for_adapters_alone(build_fit: Callable[..., Fit]) -> None:
    fit = build_fit("fit")
    fit.run([])
    names = {name for group in fit.optimizer.param_groups for name in group["names"]}
    assert names == {name for name, _ in fit.model.named_parameters() if ".lora_" in name}
    assert len(fit.optimizer.state_dict()["state"]) == len(names)
    held = sum(value.numel() for value in moments_of(fit).values() if value.ndim)
    assert held == 2 * sum(p.numel() for p in trainable(fit.model).values())


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_losses_and_gradients_are_those_of_single_examples(
    family: str, kind: str, build_fit: Callable[..., Fit]
) -> None:
    fit = build_fit("fit", family, rules={"name": kind})
    with torch.no_grad():
        for parameter in trainable(fit.model).values():
            parameter += 0.1 * torch.randn(parameter.shape)
    numbers = [0, 3, 5, 8]
    loss, found, _ = gradients(fit, numbers)
    check((loss, found), gradients_by_hand(fit.model, fit.train, numbers))


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"dropout": 0.2},
        {"name": "dora", "precision": "bf16"},
        {"name": "qlora", "dropout": 0.2},
        {"name": "qlora", "precision": "bf16"},
    ],
)
def test_killed_and_resumed_ends_with_the_same_bits(way: dict[str, Any], build_fit: Callable[..., Fit]) -> None:
    rules = {key: value for key, value in way.items() if key != "precision"}
    given = {"rules": rules, "precision": way.get("precision", "fp32"), "save_every": 1, "eval_every": 2}
    whole = build_fit("whole", **given)
    whole.run([logged(whole)])
    fit = build_fit("parts", **given)
    with pytest.raises(KilledError):
        fit.run([logged(fit), Recorder({4: kill})])
    torch.manual_seed(99)
    again = build_fit("parts", **given)
    with torch.no_grad():
        for parameter in trainable(again.model).values():
            parameter.fill_(7.0)
    assert again.resume()
    assert again.state.step == 3
    again.run([logged(again)])
    assert same_bits(weights_of(again), weights_of(whole))
    assert same_bits(moments_of(again), moments_of(whole))
    assert (facts_of(again.state), log_of(again)) == (facts_of(whole.state), log_of(whole))


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "lora"), ("gpt2", "dora"), ("bert", "lora"), ("llama", "qlora"), ("llama", "below")]
)
def test_above_a_known_prefix_losses_are_those_without(
    family: str, kind: str, build_fit: Callable[..., Fit], tmp_path: Path
) -> None:
    def losses(fit: Fit) -> list[float]:
        recorder = Recorder()
        fit.run([recorder])
        return [*recorder.of("loss"), *(loss for _, loss in recorder.evaluations)]

    def make(name: str) -> Fit:
        rules = {"name": kind} if kind != "below" else {"name": "qlora", "blocks": "1"}  # so that the prefix has 4 bits
        fit = build_fit(name, family, depth=kind != "below", rules=rules, eval_every=3)
        fit.frozen_dropout = False
        assert frozen_prefix(fit.model) == 1
        return fit

    expected = losses(make("plain"))
    known = with_known(make("known"), 1, tmp_path / "states")
    assert losses(known) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == len(expected) == 6 + 2


def test_peft_loads_what_was_trained(build_fit: Callable[..., Fit], tmp_path: Path) -> None:
    fit = build_fit("fit", "bert")
    fit.run([])
    with fit.masters.in_full() as model:
        expected = logits(model.eval())
        save_adapter(model, tmp_path / "adapter", "base")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {name for name in tensors if ".lora_" not in name} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }
    found = PeftModel.from_pretrained(build("bert"), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(found), expected, atol=1e-6, rtol=0)
