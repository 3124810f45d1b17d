"""`llmkit plan` says what will happen, and nothing happens."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from conftest import Cli, sentence, write_rows

LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    turns = ([("user", sentence(i)), ("assistant", f"It is {i}.")] for i in range(40))
    return write_rows(
        tmp_path / "rows.jsonl", ({"messages": [{"role": r, "content": c} for r, c in pair]} for pair in turns)
    )


def test_a_plan_of_a_chat_training(cli: Cli, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    flags = ("--model", tiny_llama, "--data", rows, "-o", tmp_path / "run", "--set", "freeze.blocks=0")
    outcome = cli("plan", *flags, "--set", "finetune.epochs=2", "--json")
    assert outcome.code == 0, outcome.err
    plan = outcome.json["metrics"]["finetune"]
    corpus = json.loads((tmp_path / "run" / "preprocess" / "train" / "corpus.json").read_text())
    assert plan["examples"] == corpus["examples"]
    assert plan["steps"] == 2 * -(-plan["examples"] // 8)
    assert plan["fits"] is True
    assert plan["padding_share"] == 0
    assert plan["frozen_parameters"] > 0
    parts = plan["memory_bytes"]
    assert set(parts) == {"weights", "masters", "gradients", "optimizer", "activations", "kernels", "program"}
    assert sum(parts.values()) == plan["peak_memory_bytes"]
    assert parts["gradients"] == 4 * plan["trainable_parameters"]
    assert not (tmp_path / "run" / "finetune").exists(), "nothing was trained"
    finetuned = cli("finetune", *flags, "--set", "finetune.epochs=2", "--json").json["metrics"]
    assert (finetuned["steps"], finetuned["train_tokens"]) == (plan["steps"], plan["tokens"])


def test_measured_steps_leave_nothing_behind(cli: Cli, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = cli("plan", "--model", tiny_llama, "--data", rows, "-o", run, "--measure", "--json")
    assert outcome.code == 0, outcome.err
    plan = outcome.json["metrics"]["finetune"]
    assert "measured steps" in plan["seconds_from"]
    assert plan["seconds"] > 0
    assert not list(run.glob("finetune/*"))
    assert set(json.loads((run / "run.json").read_text())["stages"]) == {"preprocess"}


def test_seventy_billion_parameters_from_a_config_alone(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(LLAMA_70B))
    started = time.monotonic()
    settings = ("freeze.blocks=0-69", "freeze.embeddings=true", "data.max_length=4096", "finetune.precision=bf16")
    flags = [word for setting in settings for word in ("--set", setting)]
    outcome = cli("plan", "--model", tmp_path / "big", "-o", tmp_path / "run", *flags, "--json")
    assert outcome.code == 0, outcome.err
    plan = outcome.json["metrics"]["finetune"]
    total = plan["trainable_parameters"] + plan["frozen_parameters"]
    assert total == 70_553_706_496
    assert plan["fits"] is False
    assert plan["memory_bytes"]["weights"] == pytest.approx(2 * total, rel=1e-3)
    assert plan["memory_bytes"]["optimizer"] == pytest.approx(8 * plan["trainable_parameters"], rel=1e-3)
    assert time.monotonic() - started < 60, "and not the hours that loading would take"


def test_what_cannot_be_measured(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(LLAMA_70B))
    outcome = cli("plan", "--model", tmp_path / "big", "-o", tmp_path / "run", "--measure")
    assert outcome.code == 2
    assert "there are no data to measure with" in outcome.err


def test_the_table_is_for_people(cli: Cli, tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    outcome = cli("plan", "--model", tiny_llama, "--data", rows, "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    for word in ("examples", "trainable", "optimizer state", "activations and logits", "peak memory", "time"):
        assert word in outcome.out
