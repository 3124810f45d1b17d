"""Which models' products can be cut over processes, and what is said of the others."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from llmkit.model.loading import build_on_meta
from llmkit.model.tensor_parallel import tensor_plan

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def model(family: str, **changes: Any) -> Any:
    return build_on_meta(AutoConfig.for_model(family, **(SHAPE | changes)), "AutoModelForCausalLM")


def test_a_plan_names_what_is_cut_in_each_block() -> None:
    plan = tensor_plan(model("qwen3"), 2)
    block = "model.layers.1."
    attention, mlp = f"{block}self_attn.", f"{block}mlp."
    assert plan.why_not is None
    assert {p for p in plan.columns if p.startswith(block)} == {
        *(attention + name for name in ("q_proj", "k_proj", "v_proj")),
        *(mlp + name for name in ("gate_proj", "up_proj")),
    }
    assert {p for p in plan.rows if p.startswith(block)} == {f"{attention}o_proj", f"{mlp}down_proj"}
    assert {p for p in plan.alone if p.startswith(block)} == {f"{attention}q_norm", f"{attention}k_norm"}
    assert len(plan.columns) == 10, "the head is in no block, and whole"


def test_dimensions() -> None:
    found = model("gpt_neox", num_key_value_heads=6)
    cut = tensor_plan(found, 2).dimensions(found)
    block = "gpt_neox.layers.0."
    assert {name.removeprefix(block): dimension for name, dimension in cut.items() if name.startswith(block)} == {
        "attention.query_key_value.weight": 0,
        "attention.query_key_value.bias": 0,
        "attention.dense.weight": 1,
        "mlp.dense_h_to_4h.weight": 0,
        "mlp.dense_h_to_4h.bias": 0,
        "mlp.dense_4h_to_h.weight": 1,
    }


@pytest.mark.parametrize(
    ("family", "changes", "parts", "why"),
    [
        ("llama", {}, 4, "num_attention_heads is 6, which 4 does not divide"),
        ("llama", {}, 3, "num_key_value_heads is 2, which 3 does not divide"),
        ("llama", {"intermediate_size": 45}, 2, "mlp.gate_proj is 45, which 2 does not divide"),
        ("gpt2", {}, 2, "Transformers has no plan for gpt2"),
        ("olmo2", {}, 2, "plan for olmo2 has layers that are colwise_gather_output"),
    ],
)
def test_what_cannot_be_cut(family: str, changes: dict[str, Any], parts: int, why: str) -> None:
    assert why in (tensor_plan(model(family, **changes), parts).why_not or "")
