"""The frozen prefix: how deep it is, what of it stands still, what decides its states, and that it can be left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from llmkit.model.anatomy import blocks_of, read_anatomy
from llmkit.model.prefix import Prefix, frozen_prefix, outputs_at, prefix_digest, still_modules

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAUSAL = ("llama", "gpt2", "gemma2")
CLASSIFIERS = ("bert", "distilbert", "roberta")
IDS = torch.tensor([[5, 9, 3, 17, 8, 2], [7, 4, 11, 6, 2, 2]])


def build(family: str, *, dropout: float = 0.0, seed: int = 1, **changes: Any) -> PreTrainedModel:
    own = {
        "llama": {"attention_dropout": dropout},
        "gemma2": {"attention_dropout": dropout, "head_dim": 8, "num_key_value_heads": 1},
        "gpt2": dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), dropout),
        "distilbert": {"dropout": dropout, "attention_dropout": dropout, "hidden_dim": 24},
    }
    rates = own.get(family, dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout))
    config = AutoConfig.for_model(family, **(SIZE | rates | changes))
    auto = AutoModelForCausalLM if family in CAUSAL else AutoModelForSequenceClassification
    torch.manual_seed(seed)
    model: PreTrainedModel = auto.from_config(config)
    return model


def freeze(model: nn.Module, blocks: tuple[int, ...], *, embeddings: bool = True) -> nn.Module:
    anatomy = read_anatomy(model)
    names = {name for number in blocks for name in anatomy.blocks[number]}
    names |= set(anatomy.embeddings) if embeddings else set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in names)
    return model


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFIERS])
@pytest.mark.parametrize(
    ("blocks", "embeddings", "expected"),
    [
        ((), True, 0),
        ((0,), True, 1),
        ((0, 1, 3), True, 2),
        ((1, 2), True, 0),
        ((0, 1, 2, 3), True, 4),
        ((0, 1, 2, 3), False, 0),
    ],
)
def test_the_prefix_ends_where_something_moves(
    family: str, blocks: tuple[int, ...], embeddings: bool, expected: int
) -> None:
    with torch.device("meta"):
        model = build(family)
    assert frozen_prefix(freeze(model, blocks, embeddings=embeddings)) == expected


@pytest.mark.parametrize("part", ["embeddings", "block"])
def test_one_moving_tensor_is_enough_to_end_it(part: str) -> None:
    model = freeze(build("gpt2"), (0, 1, 2, 3))
    anatomy = read_anatomy(model)
    name = anatomy.embeddings[-1] if part == "embeddings" else anatomy.blocks[2][-1]
    model.get_parameter(name).requires_grad_(True)
    assert frozen_prefix(model) == (0 if part == "embeddings" else 2)


def test_of_an_encoder_decoder_it_is_within_the_encoder() -> None:
    config = AutoConfig.for_model(
        "t5", **SIZE, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    count = len(read_anatomy(model).blocks)
    assert frozen_prefix(freeze(model, tuple(range(count)))) == read_anatomy(model).stacks[0][1] < count


def dropping(model: nn.Module) -> dict[str, bool]:
    """Each dropout's path, and whether it would drop."""
    return {path: module.training for path, module in model.named_modules() if isinstance(module, nn.Dropout)}


@pytest.mark.parametrize(
    ("family", "blocks", "embeddings", "still"),
    [
        ("gpt2", (0, 1), True, ("transformer.drop", "transformer.h.0.", "transformer.h.1.")),
        ("gpt2", (0, 2), False, ("transformer.h.0.", "transformer.h.2.")),
        ("gpt2", (1,), True, ("transformer.h.1.",)),
        ("bert", (0,), True, ("bert.embeddings.", "bert.encoder.layer.0.")),
        ("bert", (0, 1, 2, 3), True, ("bert.embeddings.", "bert.encoder.")),
        ("distilbert", (0,), True, ("distilbert.embeddings.", "distilbert.transformer.layer.0.")),
        ("roberta", (3,), False, ("roberta.encoder.layer.3.",)),
    ],
)
def test_what_stands_still_drops_nothing_and_the_rest_does(
    family: str, blocks: tuple[int, ...], embeddings: bool, still: tuple[str, ...]
) -> None:
    model = freeze(build(family, dropout=0.1), blocks, embeddings=embeddings).train()
    for path in still_modules(model):
        model.get_submodule(path).eval()
    found = dropping(model)
    assert {path for path, drops in found.items() if not drops} == {path for path in found if path.startswith(still)}
    assert any(found.values()), "the head or later blocks"


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFIERS])
def test_the_model_and_its_base_never_stand_still(family: str) -> None:
    model = freeze(build(family), (0, 1, 2, 3))
    still = {id(model.get_submodule(path)) for path in still_modules(model)}
    assert still >= {id(block) for block in blocks_of(model)}
    assert not still & {id(model), id(model.base_model)}
    kept_apart = [id(module) for module in model.modules() if any(p.requires_grad for p in module.parameters())]
    assert not still & set(kept_apart), "nothing that holds what moves"


@torch.no_grad()
def digest_with(model: nn.Module, name: str) -> str:
    """The digest at depth 2 while one number of a parameter is another."""
    last = model.get_parameter(name).view(-1)[-1:]
    before = last.clone()
    last += 1e-3
    digest = prefix_digest(model, 2)
    last.copy_(before)
    return digest


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFIERS])
def test_the_digest_is_of_the_weights_before(family: str) -> None:
    model = build(family)
    digest, anatomy = prefix_digest(model, 2), read_anatomy(model)
    assert prefix_digest(freeze(build(family, dropout=0.3), (0, 1)), 2) == digest, "equal weights, dropout or not"
    for name in (*anatomy.embeddings, anatomy.blocks[0][0], anatomy.blocks[1][-1]):
        assert digest_with(model, name) != digest, name
    for name in (*anatomy.blocks[2], *anatomy.blocks[3], *anatomy.final, *anatomy.head):
        assert digest_with(model, name) == digest, name
    assert len({prefix_digest(model, depth) for depth in (1, 2, 3)} | {digest}) == 3
    assert prefix_digest(build(family, seed=2), 2) != digest


CHANGES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "rope_theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, True),
    "rms_norm_eps": ("llama", {"rms_norm_eps": 1e-3}, True),
    "activation": ("llama", {"hidden_act": "gelu"}, True),
    "window": ("gemma2", {"sliding_window": 5}, True),
    "heads": ("bert", {"num_attention_heads": 4}, True),
    "labels": ("bert", {"num_labels": 7}, False),
    "names of labels": ("bert", {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}, False),
    "dropout of the head": ("bert", {"classifier_dropout": 0.5}, False),
    "cache of keys and values": ("llama", {"use_cache": False}, False),
}


@pytest.mark.parametrize(("family", "changes", "other"), CHANGES.values(), ids=CHANGES)
def test_the_digest_is_of_the_config_that_the_prefix_uses(family: str, changes: dict[str, Any], other: bool) -> None:
    assert (prefix_digest(build(family, **changes), 2) != prefix_digest(build(family), 2)) is other


def test_the_digest_is_of_the_numbers_that_it_computes_with() -> None:
    assert prefix_digest(build("llama").bfloat16(), 2) != prefix_digest(build("llama"), 2)


@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFIERS])
def test_outputs_are_those_between_blocks_and_nothing_deeper_is_computed(family: str) -> None:
    model = build(family).eval()
    with torch.no_grad():
        expected = model.base_model(IDS, output_hidden_states=True).hidden_states
    reached: list[int] = []
    for number, block in enumerate(blocks_of(model)):
        block.register_forward_hook(lambda *_, number=number: reached.append(number))
    found = outputs_at(model, [1, 3], lambda: model(input_ids=IDS))
    assert reached == [0, 1, 2]
    for depth in (1, 3):
        states = found[depth][0] if isinstance(found[depth], tuple) else found[depth]
        torch.testing.assert_close(states, expected[depth])
    reached.clear()
    model(input_ids=IDS)
    assert reached == [0, 1, 2, 3], "the whole model is there again"


def states_after(model: Any, depth: int) -> tuple[torch.Tensor, int]:
    output = outputs_at(model, [depth], lambda: model(input_ids=IDS))[depth]
    return (output[0], len(output)) if isinstance(output, tuple) else (output, 0)


@torch.no_grad()
def ruin(model: nn.Module, depth: int) -> None:
    """What is computed from these weights is no number."""
    anatomy = read_anatomy(model)
    for name in (*anatomy.embeddings, *(name for block in anatomy.blocks[:depth] for name in block)):
        if name not in anatomy.tied:
            model.get_parameter(name).fill_(torch.nan)


@pytest.mark.parametrize("depth", [1, 3, 4])
@pytest.mark.parametrize("family", [*CAUSAL, *CLASSIFIERS])
@torch.no_grad()
def test_with_known_states_nothing_before_matters(family: str, depth: int) -> None:
    model = build(family, tie_word_embeddings=False).eval()
    expected = model(input_ids=IDS).logits
    states, parts = states_after(model, depth)
    ruin(model, depth)
    assert model(input_ids=IDS).logits.isnan().all()
    prefix = Prefix(model, depth, parts)
    with prefix.entered(), prefix.left_out(depth, states):
        torch.testing.assert_close(model(input_ids=IDS).logits, expected)


@torch.no_grad()
def test_some_of_a_prefix_can_be_left_out() -> None:
    model = build("llama").eval()
    expected, prefix = model(input_ids=IDS).logits, Prefix(model, 4)
    for depth in (1, 2, 3, 4):
        states, _ = states_after(model, depth)
        with prefix.entered(), prefix.left_out(depth, states):
            torch.testing.assert_close(model(input_ids=IDS).logits, expected)
            assert not torch.allclose(prefix_with(prefix, depth, states + 1), expected), "they are used"


def prefix_with(prefix: Prefix, depth: int, states: torch.Tensor) -> torch.Tensor:
    with prefix.left_out(depth, states):
        logits: torch.Tensor = prefix.model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_outside_it_the_model_is_as_it_was(family: str) -> None:
    model = freeze(build(family), (0, 1)).train()
    blocks, names = blocks_of(model), [name for name, _ in model.named_parameters()]
    prefix = Prefix(model, 2)
    modes = {path: module.training for path, module in model.named_modules()}
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    with prefix.entered():
        assert [name for name, _ in model.named_parameters()] == names
        assert frozen_prefix(model) == 2
        assert blocks_of(model)[2:] == blocks[2:]
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, msg="all is computed while none are known")
    assert blocks_of(model) == blocks
    assert {path: module.training for path, module in model.named_modules()} == modes


@pytest.mark.parametrize("leave", [lambda model: model.eval(), lambda model: model.train()])
def test_whether_it_trains_is_handed_on(leave: Callable[[Any], Any]) -> None:
    model = build("gpt2", dropout=0.1).train()
    with Prefix(model, 2).entered():
        leave(model)
    assert len({module.training for module in model.modules()}) == 1


def test_the_digest_is_of_the_padding_that_positions_are_counted_by() -> None:
    one, other = build("roberta").eval(), build("roberta", pad_token_id=5).eval()
    other.load_state_dict(one.state_dict())
    assert not torch.allclose(states_after(one, 1)[0], states_after(other, 1)[0]), "what it is about"
    assert prefix_digest(one, 1) != prefix_digest(other, 1)
