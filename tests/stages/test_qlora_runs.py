"""Runs with adapters on top of 4 bits: what is said and planned, and that a stop changes nothing."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, Cli, Outcome, sentence, write_rows
from safetensors.torch import load_file

from llmkit.model.adapters import AdapterRules, add_adapters
from llmkit.model.loading import load_model
from llmkit.model.quantized import quantized_layers, what_is_quantized
from llmkit.train.hooks.progress import ProgressHook
from llmkit.train.masters import Masters

SETTINGS = {
    "data.eval": "20%",
    "finetune.adapter": "qlora",
    "finetune.steps": "4",
    "finetune.lr": "1e-2",
    "finetune.precision": "fp32",
    "finetune.trackers": "[]",
}
Train = Callable[..., Outcome]


@pytest.fixture
def train(cli: Cli, tiny_llama: Path, tmp_path: Path) -> Train:
    turns = ([("user", sentence(i)), ("assistant", WORDS[i % 12])] for i in range(40))
    lines = ({"messages": [{"role": role, "content": content} for role, content in pair]} for pair in turns)
    rows = write_rows(tmp_path / "chat.jsonl", lines)

    def run(out: str = "run", command: str = "finetune", flags: tuple[str, ...] = (), **settings: str) -> Outcome:
        given = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
        sets = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
        return cli(command, "-m", tiny_llama, "-d", rows, "-o", tmp_path / out, *flags, *sets)

    return run


def done(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return " ".join(outcome.err.split())


def refused(outcome: Outcome, *needles: str) -> None:
    assert outcome.code == 2, outcome.out + outcome.err
    text = "".join(outcome.err.split())
    assert not [needle for needle in needles if "".join(needle.split()) not in text], outcome.err
    assert "Traceback" not in outcome.err


def in_four_bits(folder: Path) -> Any:
    model = load_model(folder, "AutoModelForCausalLM").model
    add_adapters(model, AdapterRules(name="qlora"))
    return model


def test_a_run_says_what_four_bits_cost_and_leaves_what_it_trained(
    train: Train, tiny_llama: Path, tmp_path: Path
) -> None:
    said = done(train(command="run", evaluate__generate="0", evaluate__precision="fp32"))
    model = in_four_bits(tiny_llama)
    held = what_is_quantized(model)
    assert f"{held.layers} linear layers are held in 4 bits (NF4)" in said
    assert f"{held.error:.1%} off the parent's" in said
    before, after = (load_file(path / "model.safetensors") for path in (tiny_llama, tmp_path / "run/finetune/model"))
    layers = {path.removesuffix(".base_layer") + ".weight" for path in quantized_layers(model)}
    assert {name for name in before if not torch.equal(before[name], after[name])} == layers
    assert {tensor.dtype for tensor in after.values()} == {tensor.dtype for tensor in before.values()}
    record = json.loads((tmp_path / "run/run.json").read_text())
    scored = json.loads((tmp_path / "run/evaluate/results.json").read_text())["model"]["loss"]
    assert scored == pytest.approx(record["stages"]["finetune"]["metrics"]["eval_loss"], rel=1e-4)
    assert "bitsandbytes" in record["stages"]["finetune"]["inputs"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stop_ends_with_the_same_bits(precision: str, train: Train, tmp_path: Path) -> None:
    after = ProgressHook.after_step

    def after_step(self: Any, state: Any, values: dict[str, Any]) -> None:
        after(self, state, values)
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    done(train("whole", finetune__precision=precision))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressHook, "after_step", after_step)
        assert train("parts", finetune__precision=precision).code == 75
    done(train("parts", finetune__precision=precision))
    for file in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        whole, parts = (load_file(tmp_path / run / "finetune" / file) for run in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_an_adapter_goes_on_on_top_of_four_bits(train: Train, tmp_path: Path) -> None:
    done(train("first"))
    said = done(train("second", finetune__adapter=f"{{start: {tmp_path / 'first'}}}", finetune__lr="1e-30"))
    assert "are held in 4 bits" in said
    first, second = (load_file(tmp_path / run / "finetune/model/model.safetensors") for run in ("first", "second"))
    assert all(torch.allclose(tensor, second[name], atol=1e-6) for name, tensor in first.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_counts_four_bits_and_loading(
    precision: str, train: Train, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.stages.plan.matrix_rate", lambda *given: 1e12)
    outcome = train(command="plan", flags=("--json",), finetune__precision=precision)
    done(outcome)
    plan = outcome.json["metrics"]["finetune"]
    model = in_four_bits(tiny_llama)
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(tensor.numel() for tensor in load_file(tiny_llama / "model.safetensors").values())
    assert (plan["trainable_parameters"], plan["frozen_parameters"]) == (learn, total)
    Masters(model, precision)
    takes = [*model.parameters(), *(b for name, b in model.named_buffers() if "scales_code" not in name)]
    table = 4 * 256 * len(quantized_layers(model))  # that layers share on a CPU alone
    parts = plan["memory_bytes"]
    assert parts["weights"] == sum(t.numel() * t.element_size() for t in takes) + table
    assert sum(parts.values()) == plan["peak_memory_bytes"]
    others = sum(value for name, value in parts.items() if name not in ("loading", "program"))
    assert parts.get("loading", 0) == max(0, 4 * (total + learn) - others)


@pytest.mark.parametrize(
    ("settings", "needles"),
    [
        ({"finetune__adapter": "{name: qlora, start: x, rank: 4}"}, ("leave out rank",)),
        ({"finetune__adapter": "{name: qlor}"}, ("finetune.adapter.name", "qlora")),
        ({"freeze": "{unfreeze: ulmfit}"}, ("`freeze.unfreeze` and `finetune.adapter`", "cannot thaw")),
        (
            {"freeze": "{blocks: 0, unfreeze: [{at: 50%, blocks: 0}]}"},
            ("`freeze.unfreeze` and `finetune.adapter`", "leave out one of the two"),
        ),
        ({"freeze": "{blocks: all}"}, ("nothing to put adapters beside",)),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(
    settings: dict[str, str], needles: tuple[str, ...], train: Train, tmp_path: Path
) -> None:
    refused(train(**settings), *needles)
    if "blocks: all" not in str(settings):  # which the freeze stage finds out
        assert not (tmp_path / "run" / "preprocess").exists()


def test_without_bitsandbytes_it_is_said_what_to_install(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(train(), "`qlora` needs the package bitsandbytes", "pip install 'bitsandbytes>=0.50'", "adapter.name")
