"""Muon and AdamW as one optimizer: which parameter is whose, and what the rest of llmkit sees of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_cases import build, groups, take_steps, tensors
from transformers import AutoModelForCausalLM, LlamaConfig

from llmkit.errors import RecipeError
from llmkit.model.groups import Rates, parameter_groups
from llmkit.optim import build_optimizer

SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}


def algorithms(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    return {name: group["algorithm"] for group in optimizer.param_groups for name in group["names"]}


@pytest.mark.parametrize("tied", [True, False])
def test_the_matrices_of_the_blocks_are_muons(tied: bool) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, tie_word_embeddings=tied))
    optimizer = build_optimizer("muon", parameter_groups(model, Rates(0.1), weight_decay=0.2), lr=0.1, options={})
    found = algorithms(optimizer)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        in_a_block = ".layers." in name and parameter.ndim == 2
        assert found[name] == ("muon" if in_a_block else "adamw"), name


def test_only_two_dimensions_are_muons() -> None:
    kernel, matrix = torch.nn.Parameter(torch.ones(2, 2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    given = {"params": [kernel, matrix], "names": ["kernel", "matrix"], "hidden": [True, True]}
    assert algorithms(build("muon", [given])) == {"kernel": "adamw", "matrix": "muon"}


@pytest.mark.parametrize("given", [{}, {"hidden": [False]}])
def test_nothing_for_muon_is_an_error(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="nothing to do") as caught:
        build("muon", [{"params": [torch.nn.Parameter(torch.ones(2, 2))], **given}])
    assert "adamw" in (caught.value.hint or "")


def test_a_model_of_nothing_but_hidden_matrices_needs_no_adamw() -> None:
    optimizer = build("muon", [{"params": [torch.nn.Parameter(torch.ones(2, 2))], "names": ["m"], "hidden": [True]}])
    take_steps(optimizer, range(2))
    assert algorithms(optimizer) == {"m": "muon"}


def test_rates_are_set_from_outside_before_and_after_loading() -> None:
    optimizer = build("muon")
    take_steps(optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = {name: tensor.detach().clone() for name, tensor in tensors(optimizer).items()}
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(optimizer).items())


def test_a_closure_is_called_once_and_its_loss_given_back() -> None:
    optimizer = build("muon", groups())
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        loss = sum((tensor**2).sum() for tensor in tensors(optimizer).values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        return loss.detach()

    before = {name: tensor.detach().clone() for name, tensor in tensors(optimizer).items()}
    assert optimizer.step(closure) == sum((tensor**2).sum() for tensor in before.values())  # type: ignore[arg-type, call-overload]
    assert len(calls) == 1
    assert not any(torch.equal(tensor, before[name]) for name, tensor in tensors(optimizer).items())
