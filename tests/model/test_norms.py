"""The faster RMS norm gives the numbers of the family's own, is only put where it does, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmkit.model.norms import FusedRMSNorm, fused_norm
from llmkit.model.replacement import replaced_modules

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


def both(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> list[list[torch.Tensor]]:
    """Output and gradients by the family's own norm, and by the faster one."""
    own = LlamaRMSNorm(x.shape[-1], eps).to(weight.dtype)
    own.weight.data.copy_(weight)
    results = []
    for norm in (own, FusedRMSNorm(torch.nn.Parameter(weight.clone()), eps)):
        given = x.clone().requires_grad_()
        out = norm(given)
        torch.manual_seed(1)
        gradients = torch.autograd.grad(out, [given, norm.weight], torch.randn(out.shape).to(out.dtype))
        results.append([out.detach(), *gradients])
    return results


@pytest.mark.parametrize("shape", [(1, 8), (3, 5, 64), (2, 300, 96)])
@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_fp32_numbers_and_gradients_are_those_of_the_family(shape: tuple[int, ...], size: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape) * size + 0.3 * size
    expected, found = both(x, torch.rand(shape[-1]) + 0.5)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
        assert one.dtype == other.dtype


def test_bf16_is_as_near_to_fp32_as_the_family_is() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 200, 64).bfloat16(), (torch.rand(64) + 0.5).bfloat16()
    exact, _ = both(x.float(), weight.float())
    own, found = both(x, weight)
    for reference, theirs, ours in zip(exact, own, found, strict=True):
        assert ours.dtype == torch.bfloat16
        error, allowed = (ours.float() - reference).norm(), (theirs.float() - reference).norm()
        assert error <= 1.5 * allowed + 1e-6 * reference.norm()


def test_a_frozen_gain_has_no_gradient_and_the_input_the_same() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 16), torch.rand(16)
    expected, _ = both(x, weight)
    given = x.clone().requires_grad_()
    norm = FusedRMSNorm(torch.nn.Parameter(weight, requires_grad=False), 1e-5)
    out = norm(given)
    torch.manual_seed(1)
    (found,) = torch.autograd.grad(out, given, torch.randn(out.shape))
    torch.testing.assert_close(found, expected[1], atol=1e-6, rtol=1e-5)


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SHAPE | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(
    ("family", "count"), [("llama", 5), ("qwen3", 9), ("mistral", 5), ("gemma", 0), ("gemma2", 0), ("gpt2", 0)]
)
def test_norms_are_replaced_where_they_are_the_same_and_come_back(family: str, count: int) -> None:
    model = build(family, head_dim=8) if family in ("qwen3", "gemma", "gemma2") else build(family)
    ids = torch.randint(31, (2, 9))
    before, classes = model(ids).logits, [type(m) for m in model.modules()]
    names = list(model.state_dict())
    with replaced_modules(model, fused_norm) as replaced:
        assert replaced == count
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
        assert list(model.state_dict()) == names
        with replaced_modules(model, fused_norm) as again:
            assert again == 0
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(KeyError), replaced_modules(model, fused_norm):
        raise KeyError
    assert [type(m) for m in model.modules()] == classes


def test_a_norm_that_adds_one_to_its_gain_is_another() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden: torch.Tensor) -> Any:
            return super().forward(hidden) * 2

    holder = torch.nn.ModuleList([OddRMSNorm(8), GemmaRMSNorm(8), torch.nn.LayerNorm(8)])
    with replaced_modules(holder, fused_norm) as replaced:
        assert replaced == 0
