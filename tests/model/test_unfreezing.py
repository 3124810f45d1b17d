"""Gradual unfreezing as a plan: what begins to move, in which order, and what never does."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from llmkit.errors import ArtifactError, RecipeError
from llmkit.model.freezing import FreezePlan, ThawRule, apply_freeze, plan_freeze
from llmkit.model.parts import Parts

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "vocab_size": 40}


def model_of(family: str, kind: Any = AutoModelForCausalLM, device: str = "meta", **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **((T5 if family == "t5" else SIZE) | changes))
    with torch.device(device):
        model: PreTrainedModel = kind.from_config(config)
    return model


def llama(**changes: Any) -> PreTrainedModel:
    return model_of("llama", **({"tie_word_embeddings": False} | changes))


def tied() -> PreTrainedModel:
    return llama(tie_word_embeddings=True)


def bert() -> PreTrainedModel:
    return model_of("bert", AutoModelForSequenceClassification)


def bare() -> PreTrainedModel:
    """A model without a head."""
    return model_of("llama", AutoModel)


def t5() -> PreTrainedModel:
    return model_of("t5", AutoModelForSeq2SeqLM)


def named(model: PreTrainedModel, *parts: str) -> set[str]:
    found = {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    assert found
    return found


def everything(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def waves(plan: FreezePlan) -> list[tuple[str | int, set[str]]]:
    return [(thaw["at"], set(thaw["names"])) for thaw in plan.thaws]


def problems_of(model: PreTrainedModel, parts: Parts, *rules: ThawRule) -> list[tuple[str | None, str]]:
    with pytest.raises(RecipeError) as caught:
        plan_freeze(model, parts, rules)
    return [(problem.where, problem.what) for problem in caught.value.problems]


# The head, in parts of names, and what is with the embeddings.
ENDS: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "llama": (llama, ("lm_head", "model.norm"), ("embed_tokens",)),
    "tied": (tied, ("model.norm",), ("embed_tokens",)),
    "gpt2": (lambda: model_of("gpt2"), ("ln_f",), ("wte", "wpe")),
    "bert": (bert, ("classifier", "pooler"), ("bert.embeddings",)),
    "bare": (bare, ("norm.weight",), ("embed_tokens",)),
}


@pytest.mark.parametrize("family", ENDS)
def test_head_first_begins_with_the_head_alone(family: str) -> None:
    build, head, _ = ENDS[family]
    model = build()
    plan = plan_freeze(model, Parts(), "head-first")
    moving = {name for name in named(model, *head) if "layers." not in name}
    assert set(plan.trainable) == moving
    assert set(plan.frozen) == everything(model) - moving
    assert waves(plan) == [("20%", set(plan.frozen))]
    assert plan.frozen_for_good == frozenset()


@pytest.mark.parametrize("family", ENDS)
def test_ulmfit_thaws_the_last_block_first_and_the_embeddings_last(family: str) -> None:
    build, head, ends = ENDS[family]
    model = build()
    plan = plan_freeze(model, Parts(), "ulmfit")
    assert set(plan.trainable) == {name for name in named(model, *head) if "layers." not in name}
    blocks = [named(model, f"layers.{n}.", f"layer.{n}.", f".h.{n}.") for n in range(4)]
    assert waves(plan) == [
        ("12.5%", blocks[3]),
        ("25%", blocks[2]),
        ("37.5%", blocks[1]),
        ("50%", blocks[0] | named(model, *ends)),
    ]
    assert [thaw["what"] for thaw in plan.thaws] == ["block 3", "block 2", "block 1", "block 0 and the embeddings"]
    assert plan.frozen_for_good == frozenset()


def test_ulmfit_thaws_the_decoder_before_the_encoder() -> None:
    model = t5()
    plan = plan_freeze(model, Parts(), "ulmfit")
    assert set(plan.trainable) == named(model, "final_layer_norm")
    decoder = [named(model, f"decoder.block.{n}.") for n in range(3)]
    encoder = [named(model, f"encoder.block.{n}.") for n in range(2)]
    assert waves(plan) == [
        ("10%", decoder[2]),
        ("20%", decoder[1]),
        ("30%", decoder[0]),
        ("40%", encoder[1]),
        ("50%", encoder[0] | {"shared.weight"}),
    ]


@pytest.mark.parametrize("preset", ["head-first", "ulmfit"])
@pytest.mark.parametrize(
    "parts",
    [
        Parts(blocks="0-1"),
        Parts(embeddings=True),
        Parts(head=True),
        Parts(norms=True, blocks="3"),
        Parts(patterns=("*q_proj*", "model.norm.*")),
    ],
)
def test_what_freeze_names_never_thaws_by_a_preset(preset: str, parts: Parts) -> None:
    model = llama()
    for_good = set(plan_freeze(model, parts).frozen)
    plan = plan_freeze(model, parts, preset)
    assert plan.frozen_for_good == for_good
    thawing = [name for _, names in waves(plan) for name in names]
    assert len(thawing) == len(set(thawing))
    assert set(plan.frozen) == for_good | set(thawing)
    assert set(plan.trainable) == named(model, "lm_head", "model.norm") - for_good


def test_a_wave_of_which_nothing_is_left_is_left_out_and_the_others_keep_their_time() -> None:
    model = llama()
    plan = plan_freeze(model, Parts(blocks="1-2"), "ulmfit")
    assert waves(plan) == [("12.5%", named(model, "layers.3.")), ("50%", named(model, "layers.0.", "embed_tokens"))]


@pytest.mark.parametrize("rules", [Parts(head=True), Parts(embeddings=True), Parts(patterns=("lm_head.*",))])
def test_a_tied_head_that_is_frozen_for_good_keeps_the_embeddings_with_it(rules: Parts) -> None:
    plan = plan_freeze(tied(), rules, "ulmfit")
    assert plan.frozen_for_good == {"model.embed_tokens.weight"}
    assert all("model.embed_tokens.weight" not in names for _, names in waves(plan))


@pytest.mark.parametrize("preset", ["head-first", "ulmfit"])
def test_a_preset_that_has_nothing_to_thaw(preset: str) -> None:
    with pytest.raises(RecipeError, match="nothing to thaw") as caught:
        plan_freeze(llama(), Parts(blocks="all", embeddings=True), preset)
    assert caught.value.where == "freeze.unfreeze"


@pytest.mark.parametrize("preset", ["head-first", "ulmfit"])
def test_a_preset_that_begins_with_nothing(preset: str) -> None:
    with pytest.raises(RecipeError, match="everything would be frozen"):
        plan_freeze(bare(), Parts(patterns=("norm.weight",)), preset)


def test_mistakes_in_what_is_frozen_come_before_a_preset() -> None:
    with pytest.raises(RecipeError) as caught:
        plan_freeze(llama(), Parts(blocks="9", patterns=("nothing*",)), "ulmfit")
    assert [problem.where for problem in caught.value.problems] == ["freeze.blocks", "freeze.patterns"]


def test_a_list_thaws_what_it_names_and_leaves_the_rest() -> None:
    model = llama()
    rules = [ThawRule("50%", Parts(blocks="0")), ThawRule(7, Parts(blocks="2", patterns=("model.layers.1.mlp.*",)))]
    plain, plan = plan_freeze(model, Parts(blocks="0-2")), plan_freeze(model, Parts(blocks="0-2"), rules)
    assert waves(plan) == [
        ("50%", named(model, "layers.0.")),
        (7, named(model, "layers.2.", "layers.1.mlp.")),
    ]
    assert [thaw["what"] for thaw in plan.thaws] == ["blocks 0", "blocks 2, pattern model.layers.1.mlp.*"]
    assert plan.frozen_for_good == named(model, "layers.1.") - named(model, "layers.1.mlp.")
    assert (plan.frozen, plan.trainable, plan.reasons) == (plain.frozen, plain.trainable, plain.reasons)
    assert plan.frozen_prefix_blocks == plain.frozen_prefix_blocks


@pytest.mark.parametrize("parts", [Parts(head=True), Parts(embeddings=True), Parts(patterns=("lm_head.weight",))])
def test_tied_weights_thaw_together_by_either_name(parts: Parts) -> None:
    plan = plan_freeze(tied(), Parts(embeddings=True, blocks="0"), [ThawRule(2, parts)])
    assert waves(plan) == [(2, {"model.embed_tokens.weight"})]


def test_tied_weights_thaw_once() -> None:
    rules = [ThawRule(2, Parts(head=True)), ThawRule(3, Parts(embeddings=True))]
    assert problems_of(tied(), Parts(embeddings=True), *rules) == [("freeze.unfreeze.1", "`embeddings` thaws twice")]


@pytest.mark.parametrize(
    ("parts", "where", "what"),
    [
        (Parts(blocks="9"), "freeze.unfreeze.0.blocks", "there is no block 9"),
        (Parts(blocks=""), "freeze.unfreeze.0.blocks", "cannot be read"),
        (Parts(blocks="1-0"), "freeze.unfreeze.0.blocks", "backwards"),
        (Parts(blocks="0-1,1"), "freeze.unfreeze.0.blocks", "overlaps"),
        (Parts(blocks="all but the last 4"), "freeze.unfreeze.0.blocks", "not so many"),
        (Parts(patterns=("nothing*",)), "freeze.unfreeze.0.patterns", "matches no parameter"),
        (Parts(patterns=("re:(",)), "freeze.unfreeze.0.patterns", "not a regular expression"),
        (Parts(blocks="2"), "freeze.unfreeze.0", "`blocks 2` does not stand still"),
        (Parts(blocks="1-2"), "freeze.unfreeze.0", "`blocks 1-2` does not stand still"),
        (Parts(head=True), "freeze.unfreeze.0", "`head` does not stand still"),
        (Parts(norms=True), "freeze.unfreeze.0", "`norms` does not stand still"),
    ],
)
def test_what_cannot_thaw(parts: Parts, where: str, what: str) -> None:
    ((place, said),) = problems_of(llama(), Parts(blocks="0-1"), ThawRule("30%", parts))
    assert place == where
    assert what in said


def test_what_does_not_stand_still_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        plan_freeze(llama(), Parts(blocks="0-1"), [ThawRule(1, Parts(head=True, embeddings=True))])
    assert caught.value.got == "lm_head.weight, model.embed_tokens.weight"
    assert caught.value.where == "freeze.unfreeze.0"


def test_a_part_that_the_model_lacks() -> None:
    problems = problems_of(bare(), Parts(blocks="0"), ThawRule(1, Parts(head=True)))
    assert problems == [("freeze.unfreeze.0.head", "this model has no head")]


def test_all_mistakes_are_told_at_once() -> None:
    problems = problems_of(
        llama(),
        Parts(blocks="0-1", patterns=("nothing*",)),
        ThawRule("10%", Parts(blocks="0")),
        ThawRule("20%", Parts(blocks="0-1")),
        ThawRule("30%", Parts(blocks="7", patterns=("nowhere*",))),
        ThawRule("40%", Parts(blocks="3")),
        ThawRule("50%", Parts(blocks="0,2")),
    )
    assert [place for place, _ in problems] == [
        "freeze.patterns",
        "freeze.unfreeze.1",
        "freeze.unfreeze.2.blocks",
        "freeze.unfreeze.2.patterns",
        "freeze.unfreeze.3",
        "freeze.unfreeze.4",
        "freeze.unfreeze.4",
    ]
    said = [what.partition("` ")[2] for _, what in problems]
    assert (said[1], *said[4:]) == ("thaws twice", "does not stand still", "does not stand still", "thaws twice")


PLANS: dict[str, Any] = {
    "none": (),
    "list": [ThawRule("30%", Parts(blocks="1")), ThawRule(4, Parts(blocks="0", embeddings=True))],
    "head-first": "head-first",
    "ulmfit": "ulmfit",
}


@pytest.mark.parametrize("unfreeze", PLANS.values(), ids=PLANS)
def test_a_plan_survives_json(unfreeze: Any) -> None:
    plan = plan_freeze(llama(), Parts(blocks="0-2", embeddings=True), unfreeze)
    again = FreezePlan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.frozen_for_good == plan.frozen_for_good


@pytest.mark.parametrize("change", [{"thaws": None}, {"thaws": {}}, {"thaws": "30%"}, {"thaws": 3}])
def test_a_plan_whose_thaws_are_damaged_is_refused(change: dict[str, Any]) -> None:
    value = plan_freeze(llama(), Parts(blocks="0-2"), PLANS["ulmfit"]).to_json() | change
    with pytest.raises(ArtifactError, match="damaged") as caught:
        FreezePlan.from_json(value)
    assert "thaws" in str(caught.value.got)


def test_a_plan_without_thaws_is_refused() -> None:
    value = plan_freeze(llama(), Parts(blocks="0-2")).to_json()
    del value["thaws"]
    with pytest.raises(ArtifactError, match="damaged"):
        FreezePlan.from_json(value)


@pytest.mark.parametrize("unfreeze", PLANS.values(), ids=PLANS)
def test_all_that_ever_moves_is_to_be_trained(unfreeze: Any) -> None:
    """What is held until its step is the training's to say: it must know of all that will move."""
    model = llama()
    plan = plan_freeze(model, Parts(blocks="0-1", embeddings=True, patterns=("*q_proj*",)), ())
    apply_freeze(model, plan)
    plan = plan_freeze(model, Parts(blocks="0-1", embeddings=True), unfreeze)
    apply_freeze(model, plan)
    still = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert still == plan.frozen_for_good
