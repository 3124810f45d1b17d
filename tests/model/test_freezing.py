"""Freezing: rules become a plan that names every parameter once, and the plan is applied as it stands."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

from llmkit.errors import ArtifactError, RecipeError
from llmkit.model.freezing import FreezePlan, apply_freeze, plan_freeze
from llmkit.model.parts import Parts

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLOCK = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16  # attention, feed-forward and norms of a Llama block


def llama(*, tied: bool = True, device: str = "meta", **changes: Any) -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**(SIZE | changes), tie_word_embeddings=tied))


def bert(**changes: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(BertConfig(**(SIZE | changes)))


def frozen_blocks(plan: FreezePlan) -> list[int]:
    """The blocks that stand still, each whole."""
    numbers = {int(name.split(".")[2]) for name in plan.frozen if ".layers." in name}
    assert not any(f".layers.{number}." in name for number in numbers for name in plan.trainable)
    return sorted(numbers)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("0-9", list(range(10))),
        ("0-3,8,10-11", [0, 1, 2, 3, 8, 10, 11]),
        (" 2 , 0 - 1", [0, 1, 2]),
        ("5", [5]),
        ("all", list(range(12))),
        ("all but the last 4", list(range(8))),
        ("All but the last", list(range(11))),
        ("none", []),
    ],
)
def test_blocks(blocks: str, expected: list[int]) -> None:
    plan = plan_freeze(llama(), Parts(blocks=blocks))
    assert frozen_blocks(plan) == expected
    assert plan.frozen_count == len(expected) * BLOCK


def test_a_plan_parts_all_parameters_and_counts_them() -> None:
    model = llama(tied=False)
    plan = plan_freeze(model, Parts(blocks="0-7", embeddings=True))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sorted([*plan.frozen, *plan.trainable]) == sorted(sizes)
    assert plan.frozen_count == sum(sizes[name] for name in plan.frozen) == 8 * BLOCK + 40 * 16
    assert plan.trainable_count == sum(sizes[name] for name in plan.trainable)
    assert plan.reasons == {
        "blocks 0-7": f"8 blocks, {8 * BLOCK:,} parameters",
        "embeddings": "1 tensor, 640 parameters",
    }
    assert plan.notes == ()
    assert plan.frozen_prefix_blocks == 8


@pytest.mark.parametrize(
    ("rules", "prefix"),
    [
        (Parts(blocks="0-3", embeddings=True), 4),
        (Parts(blocks="0-3"), 0),
        (Parts(blocks="1-3", embeddings=True), 0),
        (Parts(blocks="0-1,3", embeddings=True), 2),
        (Parts(blocks="all", embeddings=True), 12),
        (Parts(embeddings=True, patterns=("model.layers.0.*", "model.layers.1.mlp.*")), 1),
        (Parts(), 0),
    ],
)
def test_frozen_prefix_needs_whole_blocks_and_the_embeddings(rules: Parts, prefix: int) -> None:
    assert plan_freeze(llama(), rules).frozen_prefix_blocks == prefix


def test_frozen_prefix_ends_with_the_encoder() -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2, vocab_size=40)
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    plan = plan_freeze(model, Parts(blocks="0-3", embeddings=True))
    assert any("decoder.block.1." in name for name in plan.frozen)
    assert not any("decoder.block.2." in name for name in plan.frozen)
    assert plan.frozen_prefix_blocks == 2


def test_embeddings_take_a_tied_head_with_them_and_say_so() -> None:
    plan = plan_freeze(llama(), Parts(embeddings=True))
    assert plan.frozen == ("model.embed_tokens.weight",)
    assert plan.notes == ("lm_head.weight is tied to model.embed_tokens.weight: it stands still with it",)


@pytest.mark.parametrize("rules", [Parts(head=True), Parts(patterns=("lm_head.*",))])
def test_a_tied_head_takes_the_embeddings_with_it_and_says_so(rules: Parts) -> None:
    plan = plan_freeze(llama(), rules)
    assert plan.frozen == ("model.embed_tokens.weight",)
    assert plan.notes == ("model.embed_tokens.weight is tied to lm_head.weight: it stands still with it",)
    assert list(plan.reasons.values()) == ["1 tensor, 640 parameters"]


def test_an_untied_head_stands_still_alone() -> None:
    plan = plan_freeze(llama(tied=False), Parts(head=True))
    assert plan.frozen == ("lm_head.weight",)
    assert plan.notes == ()


def test_norms_stand_still_everywhere() -> None:
    model = bert()
    plan = plan_freeze(model, Parts(norms=True))
    assert set(plan.frozen) == {name for name, _ in model.named_parameters() if "LayerNorm" in name}
    assert plan.frozen_count == (1 + 2 * 12) * 2 * 16


@pytest.mark.parametrize(
    ("pattern", "count"), [("*.mlp.up_proj.weight", 12), (r"re:model\.layers\.\d\.mlp\.up_proj\.weight", 10)]
)
def test_patterns_are_globs_or_whole_regular_expressions(pattern: str, count: int) -> None:
    assert len(plan_freeze(llama(), Parts(patterns=(pattern,))).frozen) == count


@pytest.mark.parametrize(
    ("blocks", "what"),
    [
        ("0-12", "no block 12"),
        ("99", "no block 99"),
        ("5-3", "backwards"),
        ("0-3,2-5", "overlaps"),
        ("1,1", "overlaps"),
        ("", "cannot be read"),
        ("0-", "cannot be read"),
        ("-1", "cannot be read"),
        ("1,,2", "cannot be read"),
        ("first", "cannot be read"),
        ("all but the last 13", "not so many"),
        ("all but the last 12", "not so many"),
        ("all but the last 0", "leaves nothing out"),
    ],
)
def test_wrong_blocks(blocks: str, what: str) -> None:
    with pytest.raises(RecipeError, match=what) as caught:
        plan_freeze(llama(), Parts(blocks=blocks))
    assert caught.value.where == "freeze.blocks"
    assert caught.value.got == blocks
    assert "12 blocks, 0 to 11" in str(caught.value.expected)


def test_misspelt_all_has_a_hint() -> None:
    with pytest.raises(RecipeError) as caught:
        plan_freeze(llama(), Parts(blocks="al"))
    assert caught.value.hint == "did you mean `all`?"


@pytest.mark.parametrize("pattern", ["model.layer.0.*", "re:model.layers.0.mlp", "re:lm_heads.*"])
def test_a_pattern_that_matches_nothing_names_the_closest(pattern: str) -> None:
    with pytest.raises(RecipeError, match="matches no parameter") as caught:
        plan_freeze(llama(), Parts(patterns=(pattern,)))
    assert caught.value.where == "freeze.patterns"
    assert ("lm_head.weight" if "lm_head" in pattern else "model.layers.0") in str(caught.value.hint)


def test_a_broken_regular_expression_and_other_mistakes_are_reported_together() -> None:
    with pytest.raises(RecipeError) as caught:
        plan_freeze(llama(), Parts(blocks="0-40", patterns=("re:(", "nothing*")))
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres == ["freeze.blocks", "freeze.patterns", "freeze.patterns"]


def test_a_part_that_the_model_lacks() -> None:
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE)).model
    with pytest.raises(RecipeError, match="has no head") as caught:
        plan_freeze(bare, Parts(head=True))
    assert caught.value.where == "freeze.head"


def test_freezing_everything_names_the_rules_that_did_it() -> None:
    with pytest.raises(RecipeError, match="everything would be frozen") as caught:
        plan_freeze(llama(), Parts(blocks="all", embeddings=True, patterns=("model.norm.*",)))
    assert caught.value.got == "blocks all, embeddings, pattern model.norm.*"


def test_a_plan_survives_json() -> None:
    plan = plan_freeze(llama(), Parts(blocks="0-3", embeddings=True, norms=True))
    assert FreezePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("change", [{"frozen": None}, {"frozen_count": "3"}, {"reasons": []}, {"extra": 1}])
def test_a_damaged_plan_is_refused(change: dict[str, Any]) -> None:
    value = plan_freeze(llama(), Parts(blocks="0-3")).to_json() | change
    with pytest.raises(ArtifactError, match="damaged") as caught:
        FreezePlan.from_json(value)
    assert next(iter(change)) in str(caught.value.got)


def test_a_plan_from_the_meta_device_is_applied_and_undone() -> None:
    plan = plan_freeze(llama(), Parts(blocks="0-3", embeddings=True))
    model = llama(device="cpu")
    apply_freeze(model, plan)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == set(plan.frozen)
    assert not model.get_output_embeddings().weight.requires_grad
    apply_freeze(model, plan_freeze(model, Parts()))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_parameters_stand_still_while_the_others_move() -> None:
    model = llama(device="cpu", num_hidden_layers=3)
    plan = plan_freeze(model, Parts(blocks="0-1", embeddings=True))
    apply_freeze(model, plan)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([item for item in model.parameters() if item.requires_grad], lr=1.0)
    ids = torch.arange(3, 23).view(2, 10)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(plan.trainable)


@pytest.mark.parametrize(
    ("changes", "what"), [({"num_hidden_layers": 13}, "says nothing of"), ({"num_hidden_layers": 11}, "has no")]
)
def test_a_plan_of_another_model_is_refused_and_changes_nothing(changes: dict[str, int], what: str) -> None:
    plan = plan_freeze(llama(), Parts(blocks="0-3"))
    other = llama(**changes)
    with pytest.raises(ArtifactError, match="another model") as caught:
        apply_freeze(other, plan)
    assert what in str(caught.value.got)
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_plan_is_immutable() -> None:
    plan = plan_freeze(llama(), Parts())
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.frozen = ()  # type: ignore[misc]
