"""`llmkit plan --nodes --gpus --gpu`: a cluster on paper, from a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, sentence, write_rows

SIZES = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "vocab_size": 32000}
CLUSTER = ("--nodes", 2, "--gpus", 8, "--gpu", "h100")


def config(folder: Path, **changes: Any) -> Path:
    """A Llama that is a config and nothing else; 0.4 billion parameters."""
    folder.mkdir()
    given = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **SIZES}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(given | heads | changes))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return config(tmp_path / "model")


def test_all_strategies_as_json(cli: Cli, model: Path, tmp_path: Path) -> None:
    flags = (
        "-m",
        model,
        "-o",
        tmp_path / "run",
        *CLUSTER,
        "--set",
        "data.max_length=2048",
        "--tokens",
        "15B",
        "--json",
    )
    outcome = cli("plan", *flags)
    assert outcome.code == 0, outcome.err
    metrics = outcome.json["metrics"]
    plan = metrics["finetune"]
    assert (plan["nodes"], plan["gpus_a_node"], plan["gpu"], plan["tokens"]) == (2, 8, "h100", 15e9)
    assert (plan["batch_sequences"], plan["sequence_tokens"], plan["precision"]) == (16, 2048, "bf16")
    found = {one["strategy"]: one for one in plan["strategies"]}
    assert {"ddp", "fsdp", "fsdp in each node", "ZeRO-1", "ZeRO-2", "tensor x fsdp", "context x fsdp"} <= set(found)
    for one in found.values():
        assert one["data"] * one["tensor"] * one["context"] * one["pipeline"] == 16
        assert sum(one["memory_bytes"].values()) == pytest.approx(one["peak_memory_bytes"], abs=10)
        assert one["fits"] is (one["peak_memory_bytes"] <= one["available_bytes"])
        assert sum(one["seconds"].values()) == pytest.approx(one["step_seconds"])
        assert one["tokens_per_second"] == pytest.approx(plan["batch_tokens"] / one["step_seconds"])
        assert one["days"] == pytest.approx(15e9 / one["tokens_per_second"] / 86400)
        assert 0 < one["mfu"] < 0.8
    parameters = plan["parameters"]
    assert found["ddp"]["sent_bytes"] == {
        "weights and gradients": pytest.approx(2 * 4 * parameters * 15 / 16, rel=1e-3)
    }
    gathered = 2 * 2 + 4  # twice the weights in bf16, once the gradients in fp32
    assert found["fsdp"]["sent_bytes"] == {
        "weights and gradients": pytest.approx(gathered * parameters * 15 / 16, rel=1e-3)
    }
    assert found["fsdp"]["memory_bytes"]["optimizer"] == pytest.approx(8 * parameters / 16, rel=1e-3)
    assert found["ddp"]["memory_bytes"]["optimizer"] == pytest.approx(8 * parameters, rel=1e-3)
    assert found[plan["auto"]["strategy"]]["fits"]
    assert [name for name, one in found.items() if one["run_by_llmkit"]] == [
        *("ddp", "fsdp", "ZeRO-1", "ZeRO-2", "context x fsdp", "tensor x fsdp", "tensor x context x fsdp")
    ]
    assert "fit" in plan["auto"]["why"]
    assert set(metrics["assumptions"]) >= {"passes", "hidden", "links", "memory"}
    assert metrics["accuracy"]["published_runs"] >= 3
    assert metrics["gpu"]["sources"]
    assert not (tmp_path / "run" / "finetune").exists(), "nothing was trained"


def test_the_tables_say_what_is_assumed(cli: Cli, model: Path, tmp_path: Path) -> None:
    outcome = cli("plan", "-m", model, "-o", tmp_path / "run", *CLUSTER, "--set", "finetune.steps=100")
    assert outcome.code == 0, outcome.err
    for needle in (
        "ddp (data 16)",
        "on paper",
        "MFU",
        "in all",
        "assumed",
        "400 Gbit/s",
        "published runs",
        "https://",
    ):
        assert needle in outcome.out, needle


def test_a_faster_network_makes_a_faster_step(cli: Cli, model: Path, tmp_path: Path) -> None:
    times = {}
    for network in (10, 400):
        flags = ("-m", model, "-o", tmp_path / "run", *CLUSTER, "--network", network, "--json")
        plan = cli("plan", *flags).json["metrics"]["finetune"]
        assert plan["network_bytes_per_second"] == network * 1e9 / 8
        times[network] = plan["strategies"][0]["step_seconds"]
    assert times[10] > 1.5 * times[400]


def test_data_and_a_small_batch(cli: Cli, tiny_llama: Path, tmp_path: Path) -> None:
    """Eight examples a step leave half of sixteen GPUs without work, and the tokens come from the corpus."""
    turns = ([("user", sentence(i)), ("assistant", f"It is {i}.")] for i in range(40))
    rows = ({"messages": [{"role": r, "content": c} for r, c in pair]} for pair in turns)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ("-m", tiny_llama, "-d", data, "-o", tmp_path / "run", *CLUSTER, "--set", "finetune.epochs=2", "--json")
    outcome = cli("plan", *flags)
    assert outcome.code == 0, outcome.err
    plan = outcome.json["metrics"]["finetune"]
    corpus = json.loads((tmp_path / "run" / "preprocess" / "train" / "corpus.json").read_text())
    assert plan["batch_sequences"] == 8
    tokens = corpus["files"]["input_ids.bin"] // 2  # of two bytes each
    assert plan["tokens"] == pytest.approx(2 * tokens, rel=0.01)
    assert plan["strategies"][0]["strategy"] == "ddp"
    assert plan["strategies"][0]["idle_gpus"] == 8


def test_sequences_are_no_longer_than_the_model_can_take(cli: Cli, model: Path, tmp_path: Path) -> None:
    flags = ("-m", model, "-o", tmp_path / "run", *CLUSTER, "--set", "data.max_length=100000", "--json")
    assert cli("plan", *flags).json["metrics"]["finetune"]["sequence_tokens"] == 8192


def test_frozen_blocks_send_no_gradients(cli: Cli, model: Path, tmp_path: Path) -> None:
    sent = {}
    for frozen in (False, True):
        more = ("--set", "freeze.blocks=0-2", "--set", "freeze.embeddings=true") if frozen else ()
        plan = cli("plan", "-m", model, "-o", tmp_path / str(frozen), *CLUSTER, *more, "--json").json["metrics"]
        sent[frozen] = plan["finetune"]["strategies"][0]["sent_bytes"]["weights and gradients"]
    assert sent[True] < 0.6 * sent[False]


def test_a_model_that_fits_nowhere_says_what_would_do(cli: Cli, tmp_path: Path) -> None:
    large = config(tmp_path / "large", hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    flags = ("-m", large, "-o", tmp_path / "run", "--nodes", 1, "--gpus", 2, "--gpu", "l4")
    outcome = cli("plan", *flags, "--json")
    assert outcome.code == 5
    error = outcome.json
    assert (error["kind"], error["what"]) == ("resource", "the model fits with no strategy")
    assert "GiB a GPU at least" in error["got"]
    assert "2 x NVIDIA L4" in error["expected"]
    assert "would do" in error["hint"]
    assert "adapter: lora" in error["hint"]
    nodes = error["hint"].split()[1]
    assert cli("plan", *flags[:4], "--nodes", nodes, "--gpus", 2, "--gpu", "l4", "--json").code == 0, "and it does"


@pytest.mark.parametrize(
    ("flags", "needles"),
    [
        (("--nodes", 2, "--gpus", 8, "--gpu", "h10"), ("did you mean `h100`?", "mi300x")),
        (("--nodes", 0, "--gpus", 8, "--gpu", "h100"), ("--nodes", "equal to 1")),
        (("--nodes", 2, "--gpus", 0, "--gpu", "h100"), ("--gpus", "equal to 1")),
        (("--nodes", 2, "--gpu", "h100", "--tokens", "many"), ("no number of tokens", "15T")),
        (("--nodes", 2, "--gpu", "h100", "--tokens", "0"), ("no number of tokens",)),
        (("--nodes", 2, "--gpu", "h100", "--network", 0), ("--network",)),
        (("--nodes", 2, "--gpu", "h100", "--measure"), ("--measure", "this machine")),
    ],
)
def test_what_is_wrong_with_a_cluster(
    cli: Cli, model: Path, tmp_path: Path, flags: tuple[Any, ...], needles: tuple[str, ...]
) -> None:
    outcome = cli("plan", "-m", model, "-o", tmp_path / "run", *flags)
    assert outcome.code == 2, outcome.err
    for needle in needles:
        assert needle in outcome.err, outcome.err
    assert not (tmp_path / "run").exists(), "and nothing was written"


def test_a_cluster_needs_a_gpu_by_name(cli: Cli, model: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine's own GPU is taken")
    outcome = cli("plan", "-m", model, "-o", tmp_path / "run", "--nodes", 2, "--gpus", 8)
    assert outcome.code == 2
    assert "name of its GPU" in outcome.err
    assert "--gpu b200, h200, h100" in outcome.err
