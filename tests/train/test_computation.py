"""What trades time for memory changes no number: activation checkpointing, compiled blocks; and dropout drops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import gradients, make_fit, one_thread, random_corpus, tiny_config, tiny_model

from llmkit.data.corpus import Corpus
from llmkit.model.loading import dropout_changes

_one_thread = pytest.fixture(autouse=True)(one_thread)
NUMBERS = [0, 5, 7, 11, 20, 21, 30, 39]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus", 40)


def kept_bytes(fit: Any) -> int:
    """What a forward keeps for its backward, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in (*fit.model.parameters(), *fit.model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = fit.objective.collate([fit.train[n] for n in NUMBERS])
    fit.model.train()
    with fit.objective.computing(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fit.objective.loss(fit.model, batch)
    return sum(kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_checkpointed_activations_give_the_same_gradients(
    tmp_path: Path, corpus: Corpus, family: str, precision: str
) -> None:
    plain = gradients(make_fit(tmp_path / "a", corpus, model=tiny_model(family), precision=precision), NUMBERS)
    fit = make_fit(tmp_path / "b", corpus, model=tiny_model(family), precision=precision, activation_checkpointing=True)
    assert fit.model.is_gradient_checkpointing
    loss, found, _ = gradients(fit, NUMBERS)
    assert loss == pytest.approx(plain[0], abs=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[1][name], atol=1e-6, rtol=1e-5)


def test_checkpointing_draws_the_same_dropout_again(tmp_path: Path, corpus: Corpus) -> None:
    found = []
    for checkpointing in (False, True):
        model = tiny_model("gpt2", dropout=0.3)
        fit = make_fit(tmp_path / "fit", corpus, model=model, activation_checkpointing=checkpointing)
        torch.manual_seed(5)
        found.append(gradients(fit, NUMBERS)[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-6, rtol=1e-5)


def test_checkpointing_keeps_less(tmp_path: Path, corpus: Corpus) -> None:
    whole, less = (
        kept_bytes(
            make_fit(tmp_path / "fit", corpus, model=tiny_model(num_hidden_layers=4), activation_checkpointing=is_on)
        )
        for is_on in (False, True)
    )
    assert less < whole / 3


@pytest.mark.slow  # compiling takes some 30 s
def test_compiled_blocks_give_the_same_training_whatever_the_lengths(tmp_path: Path, corpus: Corpus) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    losses = []
    for compiled in (False, True):
        model = tiny_model(num_hidden_layers=1)
        fit = make_fit(tmp_path / f"{compiled}", corpus, model=model, steps=3, compile=compiled)
        losses.append(fit.run([]).loss_sum)
        names = {name for name, _ in fit.model.named_parameters()}
        assert "model.layers.0.mlp.up_proj.weight" in names, "names stay"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] < 8, "not one for each length of an example"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_has_the_rate_of_the_recipe_everywhere(family: str) -> None:
    config = tiny_config(family, 0.3)
    config.update(dropout_changes(config, 0.125))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    modules = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert set(modules) <= {0.125}
    assert bool(modules) == (family == "gpt2")
    own = [m.attention_dropout for m in model.modules() if isinstance(getattr(m, "attention_dropout", None), float)]
    assert own == ([0.125] * 2 if family == "llama" else own)
    assert {getattr(own, "p", own) for own in own} <= {0.125}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("packs", [True, False])
def test_attention_drops_in_training_and_not_in_evaluation(
    tmp_path: Path, corpus: Corpus, family: str, packs: bool
) -> None:
    fit = make_fit(tmp_path / "fit", corpus, model=tiny_model(family, dropout=0.4))
    object.__setattr__(fit.objective.causal, "packs", packs)  # type: ignore[attr-defined]
    for module in fit.model.modules():  # those of the attention alone are left
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.4 if "attn_dropout" in str(module) else 0.0
    batch = fit.objective.collate([corpus[n] for n in NUMBERS])
    with fit.objective.computing(), torch.no_grad():
        drawn = {fit.objective.loss(fit.model.train(), batch).item() for _ in range(4)}
        sure = {fit.objective.loss(fit.model.eval(), batch).item() for _ in range(4)}
    assert len(drawn) == 4 or family == "gpt2"
    assert len(sure) == 1
