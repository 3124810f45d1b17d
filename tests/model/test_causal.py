"""What a causal model can do is found by trying, for any family; what it cannot do is said and done another way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, PretrainedConfig

from llmkit.model.causal import read_causal_model
from llmkit.model.packing import pack
from llmkit.model.precision import default_device
from llmkit.tasks.base import TaskSettings
from llmkit.tasks.causal import CausalTask

WORDS = 61
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PACKING: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": GPT2,
    "mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
}
RATES = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout", "classifier_dropout", "dropout")
WITHOUT_DROPOUT = dict.fromkeys(RATES, 0.0)
PADDING: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_layer": 2, "n_head": 4}, "attention cannot be replaced"),
    "gpt_neo": ({"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, "cannot be replaced"),
    "falcon_mamba": ({"state_size": 4, "time_step_rank": 4}, "cannot be replaced"),
    "mamba": ({"state_size": 4, "time_step_rank": 4}, "cannot be replaced"),
    "rwkv": ({"attention_hidden_size": 32, "context_length": 64}, "cannot be replaced"),
    "jamba": (
        {"num_key_value_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "num_experts": 2},
        "cannot be replaced",
    ),
    "lfm2": ({"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "layers of conv"),
    "recurrent_gemma": ({"lru_width": 32, "attention_window_size": 16, "head_dim": 8}, "layers of linear"),
    "gpt_oss": ({"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}, "s_aux"),
}


def config_of(family: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(family, **(SHAPE | changes))


def strong(model: Any) -> Any:
    """With weights so large that positions and neighbours show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def build(family: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config_of(family, **changes)).eval()


def task() -> CausalTask:
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=1, get_vocab=lambda: {str(i): i for i in range(WORDS)})
    return CausalTask(tokenizer, TaskSettings(64))


def examples() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found = [{"input_ids": rng.integers(3, WORDS, n), "supervised": rng.random(n) < 0.6} for n in (5, 23, 1, 40, 12)]
    return [e | {"supervised": e["supervised"] | (np.arange(len(e["supervised"])) > 2)} for e in found]


def loss_alone(model: Any, given: list[dict[str, Any]] | None = None) -> float:
    """The summed loss of each example by itself, from all logits."""
    total = 0.0
    for example in given or examples():
        ids, chosen = torch.from_numpy(example["input_ids"]), torch.from_numpy(example["supervised"])[1:]
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += F.cross_entropy(logits[chosen], ids[1:][chosen], reduction="sum").item()
    return total


def loss_together(model: Any, given: list[dict[str, Any]] | None = None) -> float:
    objective = task().objective(model)
    with objective.computing(), torch.no_grad():
        return objective.loss(model, objective.collate(given or examples())).item()


@pytest.mark.parametrize("family", PACKING)
def test_these_families_pack(family: str) -> None:
    for model in (build(family, **PACKING[family]), strong(build(family, **PACKING[family]))):
        causal = read_causal_model(model)
        assert causal.packs, causal.why
        assert causal.why is None
        assert causal.logits is not None
        assert loss_together(model) == pytest.approx(loss_alone(model), rel=1e-5)


@pytest.mark.parametrize("family", PADDING)
def test_these_families_do_not_pack_and_learn_the_right_loss_from_padded_rows(family: str) -> None:
    changes, why = PADDING[family]
    for model in (build(family, **changes), strong(build(family, **changes))):
        causal = read_causal_model(model)
        assert not causal.packs
        assert why in (causal.why or "")
        assert loss_together(model) == pytest.approx(loss_alone(model), rel=1e-5)


def test_a_family_that_is_wrongly_said_to_attend_is_found_out() -> None:
    """Recurrent layers that claim to have a replaceable attention."""

    class Recurrent(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, **others: Any) -> Any:
            out = super().forward(input_ids=input_ids, position_ids=position_ids, **others)
            out.logits = out.logits + 0.1 * out.logits.cumsum(dim=1)
            return out

    causal = read_causal_model(strong(Recurrent(config_of("llama"))))
    assert not causal.packs
    assert "see each other" in (causal.why or "")
    assert causal.logits is None


def beginning_alike() -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    first = rng.integers(3, WORDS, 14)
    rows = [np.concatenate([first, rng.integers(3, WORDS, n)]) for n in (5, 2, 9)]
    return [{"input_ids": row, "supervised": np.ones(len(row), bool)} for row in rows]


@pytest.mark.parametrize("family", PACKING)
def test_these_families_share_a_common_beginning(family: str) -> None:
    model = strong(build(family, **(PACKING[family] | WITHOUT_DROPOUT)))
    assert read_causal_model(model).shares
    assert loss_together(model, beginning_alike()) == pytest.approx(loss_alone(model, beginning_alike()), rel=1e-5)


def test_a_model_that_drops_where_the_beginning_ends_is_found_out() -> None:
    class Taking(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, **others: Any) -> Any:
            return super().forward(input_ids=input_ids, position_ids=position_ids, **others)

    class Body(LlamaModel):
        def forward(self, *given: Any, shared_prefix: int = 0, **others: Any) -> Any:
            return super().forward(*given, **others)

    class Dropped(Taking):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = Body(config)

    model = strong(Dropped(config_of("llama"))).eval()
    causal = read_causal_model(model)
    assert causal.packs, causal.why
    assert not causal.shares
    assert loss_together(model, beginning_alike()) == pytest.approx(loss_alone(model, beginning_alike()), rel=1e-5)
    assert read_causal_model(strong(Taking(config_of("llama")))).shares


def test_a_model_that_refuses_to_hear_of_a_beginning_still_packs() -> None:
    class Refusing(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, position_ids: Any = None, **others: Any) -> Any:
            if "shared_prefix" in others:
                raise TypeError("unexpected keyword argument 'shared_prefix'")
            return super().forward(input_ids=input_ids, position_ids=position_ids, **others)

    causal = read_causal_model(strong(Refusing(config_of("llama"))))
    assert (causal.packs, causal.shares) == (True, False)


def test_a_model_without_positions_is_padded() -> None:
    class NoPositions(LlamaForCausalLM):
        def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: Any = None) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = strong(NoPositions(config_of("llama"))).eval()
    causal = read_causal_model(model)
    assert (causal.packs, causal.why) == (False, "it takes no positions")
    assert causal.arguments == {"input_ids", "attention_mask", "use_cache"}
    assert loss_together(model) == pytest.approx(loss_alone(model), rel=1e-5)


@pytest.mark.parametrize("with_keep", [True, False])
def test_a_head_that_does_something_unknown_goes_through_the_whole_forward(with_keep: bool) -> None:
    class Odd(LlamaForCausalLM):
        def forward(self, input_ids: Any = None, logits_to_keep: Any = 0, **others: Any) -> Any:
            out = super().forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **others)
            out.logits = out.logits * 1.01
            return out

    class Whole(Odd):
        def forward(
            self, input_ids: Any = None, position_ids: Any = None, attention_mask: Any = None, **others: Any
        ) -> Any:
            return super().forward(input_ids, position_ids=position_ids, attention_mask=attention_mask, **others)

    class Keeping(Odd):
        def forward(
            self, input_ids: Any = None, position_ids: Any = None, logits_to_keep: Any = 0, **others: Any
        ) -> Any:
            return super().forward(input_ids, logits_to_keep, position_ids=position_ids, **others)

    model = strong((Keeping if with_keep else Whole)(config_of("llama"))).eval()
    causal = read_causal_model(model)
    assert causal.logits is None
    assert causal.packs, causal.why
    assert loss_together(model) == pytest.approx(loss_alone(model), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "head_dim": 8}),
    ],
)
def test_scales_and_caps_of_logits_are_known(family: str, changes: dict[str, Any]) -> None:
    model = strong(build(family, **changes))
    causal = read_causal_model(model)
    assert causal.packs, causal.why
    assert causal.logits is not None
    assert loss_together(model) == pytest.approx(loss_alone(model), rel=1e-5)


def test_a_head_of_another_shape_than_the_hidden_states_is_no_crash() -> None:
    """RemBERT's head projects before its output embeddings, so that hidden states do not fit them."""
    changes = {"input_embedding_size": 16, "output_embedding_size": 24, "is_decoder": True}
    model = strong(build("rembert", **changes))
    assert read_causal_model(model).logits is None
    assert loss_together(model) == pytest.approx(loss_alone(model), rel=1e-5)


def test_chunked_attention_is_padded() -> None:
    causal = read_causal_model(build("llama4_text", num_key_value_heads=2, head_dim=8, intermediate_size_mlp=48))
    assert not causal.packs
    assert "chunked" in (causal.why or "")


def test_reading_leaves_mode_attention_and_random_state() -> None:
    model = build("gpt2", **GPT2).train()
    torch.manual_seed(4)
    expected = torch.rand(1)
    torch.manual_seed(4)
    read_causal_model(model)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        causal = read_causal_model(AutoModelForCausalLM.from_config(config_of("llama")))
    assert causal.packs
    assert causal.logits is not None
    assert causal.shares == (default_device().type == "cpu"), "as the real one will"


def test_a_bf16_model_packs_too() -> None:
    causal = read_causal_model(strong(build("llama")).to(torch.bfloat16))
    assert causal.packs
    assert causal.logits is not None


def test_where_packed_examples_end() -> None:
    found = pack([np.arange(n) for n in (3, 1, 2)], share=False).inputs()
    assert found["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert found["cu_seq_lens_q"].tolist() == found["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert found["cu_seq_lens_q"].dtype == torch.int32
    assert (found["max_length_q"], found["max_length_k"]) == (3, 3)


@pytest.mark.parametrize(("lengths", "whole"), [([5, 9], 14), ([131, 133], 264), ([200, 80], 280), ([485], 488)])
def test_few_tokens_fill_up_to_a_round_length(lengths: list[int], whole: int) -> None:
    """At most 3 % of all, in a segment of their own that belongs to no example."""
    rows = [np.arange(1, length + 1) for length in lengths]
    found = pack(rows, share=False, fill=True)
    assert (sum(found.lengths), len(found.ids)) == (whole, whole)
    assert found.lengths[: len(rows)] == lengths
    assert found.inputs()["position_ids"][0, sum(lengths) :].tolist() == list(range(whole - sum(lengths)))
    assert len(found.offsets) == len(rows)
