"""Adapters: where they go, that nothing else moves, and that merged, saved and loaded they answer as they did."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from llmkit.errors import ArtifactError, LlmkitError, RecipeError
from llmkit.model.adapter_targets import not_adapted
from llmkit.model.adapters import (
    BASE,
    CONFIG,
    WEIGHTS,
    AdapterRules,
    add_adapters,
    in_four_bits,
    merged,
    misread_by_peft,
    save_adapter,
)
from llmkit.model.anatomy import blocks_of, read_anatomy
from llmkit.model.prefix import frozen_prefix, prefix_digest
from llmkit.model.quantized import numbers_in, quantized_layers, what_is_quantized

KINDS = ("lora", "rslora", "dora")
FAMILIES = ("llama", "gpt2", "bert")
CLASSIFIERS = ("bert", "roberta")
IDS = torch.tensor([[5, 9, 3, 17, 8, 2], [7, 4, 11, 6, 3, 2]])
SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "qwen2_moe": {"num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    | {"shared_expert_intermediate_size": 8},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 2},
    "deepseek_v3": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1}
    | {"topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
    | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    "falcon": {},
}


def build(family: str, **changes: Any) -> PreTrainedModel:
    """A causal model whose output embeddings are its input embeddings, or a classifier of three labels."""
    given = {"num_labels": 3} if family in CLASSIFIERS else {"tie_word_embeddings": True}
    config = AutoConfig.for_model(family, **(SIZE | OTHERS.get(family, {}) | given | changes))
    auto = AutoModelForCausalLM
    if family in CLASSIFIERS:
        auto = AutoModelForSequenceClassification
    elif family == "t5":
        auto = AutoModelForSeq2SeqLM
    torch.manual_seed(1)
    model: PreTrainedModel = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def build_on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return build(family)


def adapted(family: str = "llama", kind: str = "lora", **rules: Any) -> PreTrainedModel:
    """A model with adapters that do something."""
    model = build(family).eval()
    torch.manual_seed(5)
    add_adapters(model, AdapterRules(name=kind, rank=4, **rules))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def adapted_layers(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def linear_layers(model: nn.Module) -> set[str]:
    """Those within the blocks."""
    inside = {id(module) for block in blocks_of(model) for module in block.modules()}
    return {p for p, m in model.named_modules() if id(m) in inside and isinstance(m, nn.Linear | Conv1D)}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


def without_adapters(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer.", "."): w for name, w in weights.items() if ".lora_" not in name}


@pytest.mark.parametrize("family", [*FAMILIES, "t5", "qwen2_moe"])
def test_targets_are_the_linear_layers_of_the_blocks(family: str) -> None:
    everything = linear_layers(build_on_meta(family))
    found = {}
    for targets in ("attention", "mlp", "all"):
        model = build_on_meta(family)
        found[targets] = set(add_adapters(model, AdapterRules(targets=targets)))
        assert adapted_layers(model) == found[targets]
    assert found["all"] == everything
    assert found["attention"] == {path for path in everything if re.search("att", path, re.IGNORECASE)}
    assert found["mlp"] == everything - found["attention"]
    assert found["mlp"]


def test_targets_are_linear_layers_of_any_name() -> None:
    model = build_on_meta("falcon")
    assert set(add_adapters(model, AdapterRules())) == linear_layers(build_on_meta("falcon"))


def test_experts_in_one_tensor_are_no_linear_layers() -> None:
    model = build_on_meta("mixtral")
    assert {path.split(".")[-2] for path in add_adapters(model, AdapterRules())} == {"self_attn"}
    with pytest.raises(RecipeError) as caught:
        add_adapters(build_on_meta("mixtral"), AdapterRules(targets="mlp"))
    assert "`mlp`" in str(caught.value.got)
    assert "mlp.experts.gate_up_proj" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("family", "rules", "still", "expected"),
    [
        ("mixtral", {}, (), {"mlp.experts.gate_up_proj": 2, "mlp.experts.down_proj": 2, "mlp.gate.weight": 2}),
        ("mixtral", {}, (0,), {"mlp.experts.gate_up_proj": 1, "mlp.experts.down_proj": 1, "mlp.gate.weight": 1}),
        (
            "mixtral",
            {"blocks": "1"},
            (),
            {"mlp.experts.gate_up_proj": 1, "mlp.experts.down_proj": 1, "mlp.gate.weight": 1},
        ),
        ("mixtral", {"targets": "attention"}, (), {}),
        ("deepseek_v3", {}, (), {"mlp.experts.gate_up_proj": 1, "mlp.experts.down_proj": 1, "mlp.gate.weight": 1}),
        *((family, {}, (), {}) for family in (*FAMILIES, "t5", "falcon")),
    ],
)
def test_what_gets_no_adapters_is_known(
    family: str, rules: dict[str, Any], still: tuple[int, ...], expected: dict[str, int]
) -> None:
    model = build_on_meta(family)
    names = {name for number in still for name in read_anatomy(model).blocks[number]}
    found = not_adapted(model, AdapterRules(**rules), names)
    assert found.keys() == expected.keys()
    for path, blocks in expected.items():
        sizes = [p.numel() for name, p in model.named_parameters() if name.endswith(f".{path}")]
        assert found[path] == sizes[0] * blocks


def test_layers_that_have_the_names_of_old_experts_are_adapted_themselves(tmp_path: Path) -> None:
    """PEFT takes `gate_proj` of such a family for experts, and would put adapters beside these in its place."""
    model, expected = adapted("deepseek_v3"), linear_layers(build_on_meta("deepseek_v3"))
    assert adapted_layers(model) == expected
    assert any(path.endswith("mlp.gate_proj") for path in expected)
    other = build("deepseek_v3").eval()
    with merged(model) as weights:
        assert weights.keys() == other.state_dict().keys()
        other.load_state_dict(weights)
    torch.testing.assert_close(logits(other), logits(model), atol=1e-5, rtol=0)
    save_adapter(model, tmp_path, "base")
    again = build("deepseek_v3").eval()
    add_adapters(again, AdapterRules(start=tmp_path))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(("family", "misread"), [("deepseek_v3", True), ("mixtral", False), ("llama", False)])
def test_it_is_known_what_peft_would_misread(family: str, misread: bool) -> None:
    model = build_on_meta(family)
    add_adapters(model, AdapterRules())
    assert misread_by_peft(model) is misread


@pytest.mark.parametrize(
    ("blocks", "still", "expected"), [(None, (), {0, 1}), (None, (0,), {1}), ("1", (), {1}), ("0", (1,), {0})]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_only_blocks_that_may_move_get_adapters(
    family: str, blocks: str | None, still: tuple[int, ...], expected: set[int]
) -> None:
    model = build_on_meta(family)
    anatomy = read_anatomy(model)
    names = {*anatomy.embeddings, *(name for number in still for name in anatomy.blocks[number])}
    add_adapters(model, AdapterRules(blocks=blocks), names)
    found = {number for number, block in enumerate(blocks_of(model)) if adapted_layers(block)}
    assert found == expected
    head = set(anatomy.head) if family == "bert" else set()
    assert {name for name in trainable(model) if ".lora_" not in name} == head


@pytest.mark.parametrize(
    ("rules", "still", "needles"),
    [
        ({"blocks": "0"}, (0,), ("stand still", "blocks 0", "`freeze` does not name")),
        ({"blocks": "2"}, (), ("no block 2", "2 blocks, 0 to 1")),
        ({"blocks": "1-0"}, (), ("runs backwards", "0-19")),
        ({}, (0, 1), ("nothing to put adapters beside", "do not stand still")),
        ({"blocks": "none"}, (), ("nothing to put adapters beside", "do not stand still")),
    ],
)
def test_what_cannot_be_asked_for_says_what_can(
    rules: dict[str, Any], still: tuple[int, ...], needles: tuple[str, ...]
) -> None:
    model = build_on_meta("llama")
    names = {name for number in still for name in read_anatomy(model).blocks[number]}
    with pytest.raises(RecipeError) as caught:
        add_adapters(model, AdapterRules(**rules), names)
    said = " ".join(str(part) for part in (caught.value, caught.value.got, caught.value.expected, caught.value.where))
    assert not [needle for needle in (*needles, "adapter") if needle not in said], said


def test_without_peft_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RecipeError) as caught:
        add_adapters(build_on_meta("llama"), AdapterRules())
    assert "pip install" in str(caught.value.hint)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapters_change_nothing(family: str, kind: str) -> None:
    expected = logits(build(family).eval())
    model = build(family).eval()
    add_adapters(model, AdapterRules(name=kind))
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=0)


def test_how_much_an_adapter_counts() -> None:
    scales = []
    for kind in ("lora", "rslora"):
        model = build("llama")
        add_adapters(model, AdapterRules(name=kind, rank=4, alpha=12))
        scales += [{m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}]
    assert scales == [{12 / 4}, {12 / 2}]


def test_the_output_matrix_of_a_language_model_stands_still() -> None:
    model = build("llama", tie_word_embeddings=False)
    add_adapters(model, AdapterRules())
    assert {name for name in trainable(model) if ".lora_" not in name} == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_weights_answer_as_model_and_adapter_do(family: str, kind: str) -> None:
    model = adapted(family, kind)
    expected = logits(model)
    assert not torch.allclose(expected, logits(build(family).eval()), atol=1e-2), "the adapters do something"
    other = build(family, **({"id2label": {0: "x", 1: "y", 2: "z"}} if family == "bert" else {})).eval()
    with merged(model) as weights:
        assert weights.keys() == other.state_dict().keys()
        other.load_state_dict(weights)
    torch.testing.assert_close(logits(other), expected, atol=1e-5, rtol=0)


class _Error(Exception):
    pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_after_merging_the_model_is_as_it_was(fails: bool, kind: str) -> None:
    model = adapted("gpt2", kind)
    expected, before = logits(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    try:
        with merged(model):
            if fails:
                raise _Error
    except _Error:
        assert fails
    assert same_bits({name: p.detach() for name, p in model.named_parameters()}, before)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraLayer))
    assert torch.equal(logits(model), expected)
    with merged(model) as weights:
        assert not torch.equal(weights["transformer.h.0.attn.c_attn.weight"], _base(before))


def _base(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    return weights["transformer.h.0.attn.c_attn.base_layer.weight"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_is_saved(family: str, kind: str, tmp_path: Path) -> None:
    model = adapted(family, kind)
    save_adapter(model, tmp_path / "adapter", "the/base")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {WEIGHTS, CONFIG}
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "the/base"
    assert config["modules_to_save"] == (["classifier"] if family == "bert" else None)
    found = PeftModel.from_pretrained(build(family), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(found), logits(model), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_goes_on_where_it_was(family: str, kind: str, tmp_path: Path) -> None:
    model = build(family).eval()
    rules = AdapterRules(name=kind, rank=4, alpha=6, targets="attention", blocks="1")
    add_adapters(model, rules)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1 * torch.randn(parameter.shape)
    save_adapter(model, tmp_path / "adapter", "base")
    again = build(family).eval()
    add_adapters(again, AdapterRules(start=tmp_path / "adapter"))
    assert same_bits(trainable(again), trainable(model))
    assert torch.equal(logits(again), logits(model))


def made_by_peft(folder: Path, *, inference: bool, **rules: Any) -> Any:
    """A model with an adapter that PEFT itself has saved."""
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), LoraConfig(r=3, target_modules=["q_proj", "v_proj"], **rules)).eval()
    model.save_pretrained(folder)
    change_config(inference_mode=inference)(folder)
    return model


@pytest.mark.parametrize(
    ("kind", "inference"),
    [
        ("lora", False),
        ("lora", True),
        ("dora", False),
    ],
)
def test_what_peft_made_goes_on_too(kind: str, inference: bool, tmp_path: Path) -> None:
    theirs = made_by_peft(tmp_path, inference=inference, use_dora=kind == "dora", init_lora_weights=False)
    model = build("llama").eval()
    add_adapters(model, AdapterRules(start=tmp_path))
    assert {path.rpartition(".")[2] for path in adapted_layers(model)} == {"q_proj", "v_proj"}
    assert all(".lora_" in name for name in trainable(model))
    torch.testing.assert_close(logits(model), logits(theirs))


def test_the_layers_that_are_adapted_are_given_when_going_on(tmp_path: Path) -> None:
    made_by_peft(tmp_path, inference=False)
    model = build("llama")
    assert set(add_adapters(model, AdapterRules(start=tmp_path))) == adapted_layers(model)


def test_going_on_puts_no_adapters_into_frozen_blocks(tmp_path: Path) -> None:
    save_adapter(adapted("llama"), tmp_path, "base")
    model = build("llama")
    anatomy = read_anatomy(model)
    try:
        add_adapters(model, AdapterRules(start=tmp_path), [*anatomy.embeddings, *anatomy.blocks[0]])
    except LlmkitError:
        return
    assert frozen_prefix(model) == 1


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def halve_the_config(folder: Path) -> None:
    (folder / CONFIG).write_text("{")


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def rename_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.other.lora_A.weight"] = tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "another rank": (change_config(r=8), "does not fit"),
    "another kind": (change_config(use_dora=True), "does not fit"),
    "layers that are not there": (change_config(target_modules=["nothing"]), "does not fit"),
    "another method": (change_config(peft_type="IA3"), "no LoRA adapter"),
    "no method": (change_config(peft_type=None), "no LoRA adapter"),
    "half of the config": (halve_the_config, "damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "no weights"),
    "half of the weights": (truncate, "damaged"),
    "another tensor": (rename_a_tensor, "does not fit"),
}


@pytest.mark.parametrize(("damage", "needle"), DAMAGES.values(), ids=DAMAGES)
def test_an_adapter_that_cannot_be_gone_on_from_is_named(
    damage: Callable[[Path], None], needle: str, tmp_path: Path
) -> None:
    save_adapter(adapted("llama"), tmp_path, "base")
    damage(tmp_path)
    with pytest.raises(ArtifactError, match=needle) as caught:
        add_adapters(build("llama"), AdapterRules(start=tmp_path))
    assert str(tmp_path) in str(caught.value.where)
    assert caught.value.got or caught.value.expected


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"num_hidden_layers": 1}])
def test_an_adapter_of_another_size_is_refused(changes: dict[str, int], tmp_path: Path) -> None:
    save_adapter(adapted("llama"), tmp_path, "base")
    with pytest.raises(ArtifactError, match="does not fit"):
        add_adapters(build("llama", **changes), AdapterRules(start=tmp_path))


def test_an_adapter_beside_experts_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted("llama"), tmp_path, "base")
    change_config(target_parameters=["mlp.experts.down_proj"])(tmp_path)
    with pytest.raises(ArtifactError, match="no linear layer holds") as caught:
        add_adapters(build("llama"), AdapterRules(start=tmp_path))
    assert "mlp.experts.down_proj" in str(caught.value.got)


IN_FOUR_BITS = ("llama", "gpt2", "bert", "t5", "qwen2_moe", "deepseek_v3")


@pytest.mark.parametrize("family", IN_FOUR_BITS)
def test_what_is_merged_answers_as_the_model_in_four_bits(family: str) -> None:
    model, plain = adapted(family, "qlora"), build(family).eval()
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if family == "t5" else {})
    with torch.no_grad(), merged(model) as weights:
        expected = model(**inputs).logits
        assert weights.keys() == plain.state_dict().keys()
        same = {name for name, tensor in plain.state_dict().items() if torch.equal(weights[name], tensor)}
        plain.load_state_dict(weights)
        torch.testing.assert_close(plain(**inputs).logits, expected, atol=1e-5, rtol=0)
    products = {f"{path}.weight" for path in linear_layers(build_on_meta(family))}
    head = {name for name in trainable(model) if ".lora_" not in name}
    assert same == plain.state_dict().keys() - products - head, "all else has the bits of the parent"
    assert {tensor.dtype for tensor in weights.values()} <= {torch.float32, torch.int64, torch.bool}


@pytest.mark.parametrize("family", FAMILIES)
def test_after_merging_four_bits_are_as_they_were(family: str) -> None:
    model = adapted(family, "qlora")
    before = {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    expected = logits(model)
    with merged(model):
        pass
    assert same_bits({name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}, before)
    assert torch.equal(logits(model), expected)


def test_all_blocks_are_in_four_bits_but_what_is_frozen_by_name() -> None:
    for rules, still in (({"blocks": "1"}, ()), ({"targets": "attention"}, ()), ({}, (0,))):
        model, parent = build("llama"), build("llama")
        frozen = {name for number in still for name in read_anatomy(model).blocks[number]}
        add_adapters(model, AdapterRules(name="qlora", **rules), frozen)
        found = {path.removesuffix(".base_layer") for path in quantized_layers(model)}
        assert found == {path for path in linear_layers(parent) if f"{path}.weight" not in frozen}
        named = dict(model.named_parameters())
        assert all(torch.equal(named[name], parent.get_parameter(name)) for name in frozen)


@pytest.mark.parametrize("family", IN_FOUR_BITS)
def test_four_bits_on_the_meta_device_take_what_they_really_take(family: str) -> None:
    real, empty = build(family), build_on_meta(family)
    for model in (real, empty):
        add_adapters(model, AdapterRules(name="qlora", rank=4))
    shapes = [[(n, t.shape, t.dtype) for n, t in [*m.named_parameters(), *m.named_buffers()]] for m in (real, empty)]
    assert [row for row in shapes[0] if "scales_code" not in row[0]] == [
        row for row in shapes[1] if "scales_code" not in row[0]
    ], "but for a table that real layers share"
    assert numbers_in(empty) == numbers_in(build(family)) + sum(
        p.numel() for n, p in empty.named_parameters() if ".lora_" in n
    )
    assert what_is_quantized(empty).bytes == what_is_quantized(real).bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_what_was_saved_on_top_of_four_bits(family: str, tmp_path: Path) -> None:
    model = adapted(family, "qlora")
    save_adapter(model, tmp_path, "the/base")
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, CONFIG, BASE}
    base = build(family)
    for path, layer in quantized_layers(model).items():
        base.get_submodule(path.removesuffix(".base_layer")).weight.data = layer.original()
    found = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(logits(found), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_goes_on_on_top_of_four_bits_where_it_was_so(family: str, tmp_path: Path) -> None:
    model = adapted(family, "qlora", blocks="1")
    save_adapter(model, tmp_path, "base")
    again = build(family).eval()
    add_adapters(again, AdapterRules(start=tmp_path))
    assert in_four_bits(AdapterRules(start=tmp_path))
    assert same_bits(trainable(again), trainable(model))
    assert torch.equal(logits(again), logits(model))


def test_what_peft_made_goes_on_on_top_of_four_bits_when_it_is_asked_for(tmp_path: Path) -> None:
    made_by_peft(tmp_path, inference=False)
    assert not in_four_bits(AdapterRules(start=tmp_path))
    model = build("llama")
    add_adapters(model, AdapterRules(name="qlora", start=tmp_path))
    assert len(quantized_layers(model)) == len(linear_layers(build("llama")))
    assert {path.rpartition(".")[2] for path in adapted_layers(model)} == {"q_proj", "v_proj"}


def test_dora_on_top_of_four_bits_is_refused(tmp_path: Path) -> None:
    made_by_peft(tmp_path, inference=False, use_dora=True)
    with pytest.raises(RecipeError, match="DoRA") as caught:
        add_adapters(build("llama"), AdapterRules(name="qlora", start=tmp_path))
    assert caught.value.where == "adapter.start"


@pytest.mark.parametrize("build_it", [build, build_on_meta])
def test_a_model_with_nothing_to_hold_in_four_bits_is_refused(build_it: Callable[[str], Any]) -> None:
    with pytest.raises(RecipeError, match="nothing to hold in 4 bits") as caught:
        add_adapters(build_it("falcon"), AdapterRules(name="qlora"))
    assert "FalconLinear" in str(caught.value.got)


def test_states_below_other_four_bits_have_another_key() -> None:
    """Weights twice as large have the same codes, and scales twice as large."""
    digests = []
    for factor in (1, 2, 1):
        model = build("llama")
        with torch.no_grad():
            for path in linear_layers(model):
                model.get_submodule(path).weight *= factor
        add_adapters(model, AdapterRules(name="qlora", blocks="1"))
        assert frozen_prefix(model) == 1
        digests.append(prefix_digest(model, 1))
    assert digests[0] == digests[2] != digests[1]
