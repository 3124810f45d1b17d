"""Rates by depth and by part: every trainable parameter has one rate, and which one can be told by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from llmkit.errors import RecipeError
from llmkit.model.groups import RateRule, Rates, parameter_groups
from llmkit.model.parts import Parts
from llmkit.recipe.load import load_recipe, validate
from llmkit.stages.training import rates_of

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "vocab_size": 40}


def model_of(family: str, kind: Any = AutoModelForCausalLM, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **((T5 if family == "t5" else SIZE) | changes))
    with torch.device("meta"):
        model: PreTrainedModel = kind.from_config(config)
    return model


def llama(**changes: Any) -> PreTrainedModel:
    return model_of("llama", **({"tie_word_embeddings": False} | changes))


def bert() -> PreTrainedModel:
    return model_of("bert", AutoModelForSequenceClassification)


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": lambda: model_of("gpt2"),
    "bert": bert,
    "t5": lambda: model_of("t5", AutoModelForSeq2SeqLM),
}


def rates_by_name(model: PreTrainedModel, rates: Rates) -> dict[str, float]:
    """The rate of each parameter that is in a group; it is in one only."""
    groups = parameter_groups(model, rates, weight_decay=0.1)
    names = [name for group in groups for name in group["names"]]
    assert len(names) == len(set(names))
    return {name: group["lr"] for group in groups for name in group["names"]}


def problems_of(model: PreTrainedModel, *rules: RateRule, layer_decay: float = 1.0) -> list[tuple[str | None, str]]:
    with pytest.raises(RecipeError) as caught:
        parameter_groups(model, Rates(1.0, layer_decay, rules), weight_decay=0.1)
    return [(problem.where, problem.what) for problem in caught.value.problems]


def frozen(model: PreTrainedModel, *parts: str) -> PreTrainedModel:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model


# How many blocks below the head what has such a name is, by hand; the first that is found in a name counts.
HEIGHTS = {
    "llama": {"embed_tokens": 4, "layers.0.": 3, "layers.1.": 2, "layers.2.": 1, "model.norm": 0, "lm_head": 0},
    "tied": {"embed_tokens": 4, "layers.0.": 3, "layers.1.": 2, "layers.2.": 1, "model.norm": 0},
    "gpt2": {"wte": 4, "wpe": 4, "h.0.": 3, "h.1.": 2, "h.2.": 1, "ln_f": 0},
    "bert": {"embeddings": 4, "layer.0.": 3, "layer.1.": 2, "layer.2.": 1, "pooler": 0, "classifier": 0},
    "t5": {
        "shared": 4,
        "encoder.block.0.": 2,
        "encoder.block.1.": 1,
        "decoder.block.0.": 3,
        "decoder.block.1.": 2,
        "decoder.block.2.": 1,
        "final_layer_norm": 0,
    },
}


@pytest.mark.parametrize("family", HEIGHTS)
def test_the_rate_falls_with_every_block_below_the_head(family: str) -> None:
    found = rates_by_name(MODELS[family](), Rates(0.02, 0.9))
    used = set()
    for name, rate in found.items():
        part = next(part for part in HEIGHTS[family] if part in name)
        used.add(part)
        assert rate == pytest.approx(0.02 * 0.9 ** HEIGHTS[family][part], rel=1e-12), name
    assert used == HEIGHTS[family].keys(), "each part has a parameter"


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
@pytest.mark.parametrize("family", MODELS)
def test_every_trainable_parameter_is_in_one_group(family: str, layer_decay: float) -> None:
    model = MODELS[family]()
    first = next(name for name, _ in model.named_parameters())
    for rules in ((), (RateRule(Parts(norms=True), lr_scale=0.5), RateRule(Parts(patterns=(first,)), lr=0.3))):
        assert rates_by_name(model, Rates(0.1, layer_decay, rules)).keys() == dict(model.named_parameters()).keys()
    moving = rates_by_name(frozen(model, first), Rates(0.1, layer_decay, [RateRule(Parts(norms=True), lr=0.5)]))
    assert moving.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_groups_are_named_by_part_and_by_whether_they_decay() -> None:
    groups = parameter_groups(llama(), Rates(1.0, 0.5), weight_decay=0.1)
    assert [(group["group"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("embeddings, decay", 0.0625, 0.1),
        ("block 0, decay", 0.125, 0.1),
        ("block 1, decay", 0.25, 0.1),
        ("block 2, decay", 0.5, 0.1),
        ("head, decay", 1.0, 0.1),
        ("block 0, no_decay", 0.125, 0.0),
        ("block 1, no_decay", 0.25, 0.0),
        ("block 2, no_decay", 0.5, 0.0),
        ("head, no_decay", 1.0, 0.0),
    ]
    parts = {group["group"]: group["names"] for group in groups}
    assert parts["embeddings, decay"] == ["model.embed_tokens.weight"]
    assert parts["head, decay"] == ["lm_head.weight"]
    assert parts["head, no_decay"] == ["model.norm.weight"]


def test_two_stacks_are_told_apart() -> None:
    groups = parameter_groups(MODELS["t5"](), Rates(1.0, 0.5), weight_decay=0.1)
    assert {group["group"].removesuffix(", decay"): group["lr"] for group in groups if group["weight_decay"]} == {
        "embeddings": 1 / 16,
        "encoder block 0": 1 / 4,
        "encoder block 1": 1 / 2,
        "decoder block 0": 1 / 8,
        "decoder block 1": 1 / 4,
        "decoder block 2": 1 / 2,
    }


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_is_in_a_group_goes_with_its_tensor_and_its_kind(family: str) -> None:
    model = MODELS[family]()
    rates = Rates(1.0, 0.5, [RateRule(Parts(blocks="1"), lr=3.0)])
    kinds = {}
    for group in parameter_groups(model, Rates(1.0), weight_decay=0.1):
        kinds |= dict(zip(group["names"], group["hidden"], strict=True))
    parameters = dict(model.named_parameters())
    for group in parameter_groups(model, rates, weight_decay=0.1):
        assert all(parameters[name] is tensor for name, tensor in zip(group["names"], group["params"], strict=True))
        assert group["hidden"] == [kinds[name] for name in group["names"]]
        assert {parameters[name].ndim > 1 for name in group["names"]} == {group["weight_decay"] > 0}


def test_without_keys_there_are_two_groups_of_one_rate() -> None:
    groups = parameter_groups(llama(), Rates(0.3), weight_decay=0.1)
    assert [(group["group"], group["lr"]) for group in groups] == [("decay", 0.3), ("no_decay", 0.3)]


def test_only_what_a_rule_names_has_another_rate() -> None:
    found = rates_by_name(bert(), Rates(0.1, rules=[RateRule(Parts(head=True), lr_scale=10)]))
    other = {name for name, rate in found.items() if rate != 0.1}
    assert other == {"classifier.weight", "classifier.bias"}
    assert {found[name] for name in other} == {1.0}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_rules_come_on_top_of_the_depth(layer_decay: float) -> None:
    """`lr` stands as it is; `lr_scale` multiplies what the part would have."""
    model = llama()
    rules = [
        RateRule(Parts(blocks="0,2"), lr=7.0),
        RateRule(Parts(blocks="1"), lr_scale=3.0),
        RateRule(Parts(patterns=(r"re:lm_head\..*", "model.norm.*")), lr_scale=10.0),
    ]
    plain, found = rates_by_name(model, Rates(2.0, layer_decay)), rates_by_name(model, Rates(2.0, layer_decay, rules))
    for name, rate in found.items():
        block = name.split(".")[2] if ".layers." in name else ""
        scale = 3.0 if block == "1" else 10.0 if name in ("lm_head.weight", "model.norm.weight") else 1.0
        assert rate == (7.0 if block in ("0", "2") else plain[name] * scale), name


def test_a_rule_may_name_several_parts_some_of_them_frozen() -> None:
    model = frozen(llama(), "layers.0.")
    rule = RateRule(Parts(blocks="0-1", embeddings=True), lr=5.0)
    groups = parameter_groups(model, Rates(1.0, rules=[rule]), weight_decay=0.1)
    ruled = [group for group in groups if group["lr"] == 5.0]
    assert [group["group"] for group in ruled] == ["blocks 0-1, embeddings, decay", "blocks 0-1, embeddings, no_decay"]
    names = {name for group in ruled for name in group["names"]}
    assert names == {name for name, _ in model.named_parameters() if "layers.1." in name or "embed" in name}


def test_the_embeddings_rate_is_that_of_a_tied_head() -> None:
    found = rates_by_name(llama(tie_word_embeddings=True), Rates(1.0, 0.5, [RateRule(Parts(embeddings=True), lr=3.0)]))
    assert found["model.embed_tokens.weight"] == 3.0
    assert "lm_head.weight" not in found


@pytest.mark.parametrize(
    ("parts", "where", "what"),
    [
        (Parts(blocks="3"), "rates.0.blocks", "there is no block 3"),
        (Parts(blocks="2-1"), "rates.0.blocks", "backwards"),
        (Parts(blocks=""), "rates.0.blocks", "cannot be read"),
        (Parts(patterns=("model.layer.*",)), "rates.0.patterns", "matches no parameter"),
        (Parts(patterns=("re:(",)), "rates.0.patterns", "not a regular expression"),
        (Parts(blocks="0"), "rates.0", "`blocks 0` stands still"),
        (Parts(patterns=("*layers.0.mlp*",)), "rates.0", "stands still"),
    ],
)
def test_a_rule_that_gives_nothing_a_rate_names_its_place(parts: Parts, where: str, what: str) -> None:
    ((place, said),) = problems_of(frozen(llama(), "layers.0."), RateRule(parts, lr=1.0))
    assert place == where
    assert what in said


def test_a_part_that_the_model_lacks() -> None:
    ((place, said),) = problems_of(llama().model, RateRule(Parts(head=True), lr=1.0))
    assert (place, said) == ("rates.0.head", "this model has no head")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Parts(blocks="0-1"), Parts(blocks="1-2")),
        (Parts(norms=True), Parts(blocks="2")),
        (Parts(head=True), Parts(patterns=("lm_head.weight",))),
    ],
)
def test_two_rules_for_one_parameter(first: Parts, second: Parts) -> None:
    ((place, said),) = problems_of(llama(), RateRule(first, lr=1.0), RateRule(second, lr_scale=2.0))
    assert place == "rates.1"
    assert said.endswith("give two rates")


def test_two_rules_may_share_what_stands_still() -> None:
    rules = [RateRule(Parts(blocks="0-1"), lr=1.0), RateRule(Parts(blocks="0,2"), lr=2.0)]
    found = rates_by_name(frozen(llama(), "layers.0."), Rates(9.0, rules=rules))
    assert found["model.layers.1.mlp.up_proj.weight"] == 1.0
    assert found["model.layers.2.mlp.up_proj.weight"] == 2.0


def test_all_mistakes_are_told_at_once() -> None:
    problems = problems_of(
        frozen(llama(), "layers.0."),
        RateRule(Parts(blocks="0"), lr=1.0),
        RateRule(Parts(blocks="1"), lr=1.0),
        RateRule(Parts(blocks="40", patterns=("nothing*", "nowhere*")), lr=1.0),
        RateRule(Parts(blocks="all"), lr=1.0),
        layer_decay=0.9,
    )
    assert [place for place, _ in problems] == [
        "rates.0",
        "rates.2.blocks",
        "rates.2.patterns",
        "rates.2.patterns",
        "rates.3",
    ]
    assert "`blocks all` and `blocks 1` give two rates" in problems[-1][1]


RECIPE = "name: x\ntask: text\nmodel: m\ndata: {train: rows.jsonl}\nfinetune:\n"


def test_the_keys_of_a_recipe_become_rates() -> None:
    keys = {"layer_decay": 0.9, "rates": [{"head": True, "lr_scale": 10}, {"blocks": 2, "norms": True, "lr": 1e-5}]}
    base = {"name": "x", "task": "text", "model": "m", "data": {"train": "rows.jsonl"}}
    rates = rates_of(validate({**base, "finetune": keys}, {}).finetune, 3e-4)
    assert rates == Rates(
        3e-4,
        0.9,
        [RateRule(Parts(head=True), lr_scale=10.0), RateRule(Parts(blocks="2", norms=True), lr=1e-5)],
    )
    assert rates_of(validate(base, {}).finetune, 3e-4) == Rates(3e-4, 1.0, [])


@pytest.mark.parametrize(
    ("keys", "line", "said"),
    [
        ("  layer_decay: 1.5\n", 6, ("finetune.layer_decay", "up to 1")),
        ("  layer_decay: 0\n", 6, ("finetune.layer_decay", "above 0")),
        ("  steps: 3\n  layer_decya: 0.9\n", 7, ("finetune.layer_decya", "did you mean `layer_decay`?")),
        ("  rates:\n    - {head: true, lr: 1, lr_scale: 2}\n", 7, ("finetune.rates.0", "one of the two")),
        ("  rates:\n    - {head: true}\n", 7, ("finetune.rates.0", "one of the two")),
        ("  rates:\n    - {head: true, lr: 1}\n    - {lr: 1}\n", 8, ("finetune.rates.1", "names no part")),
        ("  rates:\n    - head: true\n      lr: 0\n", 8, ("finetune.rates.0.lr", "above 0")),
        ("  rates:\n    - head: true\n      lr_scale: -1\n", 8, ("finetune.rates.0.lr_scale", "above 0")),
        ("  rates:\n    - {haed: true, lr: 1}\n", 7, ("finetune.rates.0.haed", "did you mean `head`?")),
        ("  rates: {head: true, lr: 1}\n", 6, ("finetune.rates", "a list")),
    ],
)
def test_a_mistake_in_the_keys_has_its_line(keys: str, line: int, said: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE + keys)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    (problem,) = caught.value.problems
    assert problem.where == f"{path}:{line}"
    whole = " ".join(filter(None, (problem.what, problem.expected, problem.hint)))
    assert all(part in whole for part in said), whole
