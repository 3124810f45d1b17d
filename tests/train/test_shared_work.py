"""Processes that share products, or the tokens of examples, learn what one learns, and go on from each other's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sharded_processes
import torch
from fitting import random_corpus
from forked import ranks, start, wait_for_all
from outcomes import found, require_same_course
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SHORT = {"batch_size": 5, "steps": 5, "eval_every": 3}
TENSOR, CONTEXT = {"sharded": True, "tensor": 2}, {"sharded": True, "context": 2}
BOTH = TENSOR | CONTEXT
# 25 examples in batches of 4: the seventh batch of an epoch has one example, fewer than there are shares
UNEVEN = {"batch_size": 4, "steps": 9, "eval_every": 4}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "products": (TENSOR, UNEVEN),
    "products, tied": (TENSOR, SHORT | {"micro_batch_size": 1, "config": {"tie_word_embeddings": True}}),
    "products, norms of heads": (TENSOR, SHORT | {"family": "qwen3"}),
    "products, biases": (TENSOR, SHORT | {"family": "gpt_neox"}),
    "products, frozen": (TENSOR, SHORT | {"frozen": "layers.0", "ema": 0.7}),
    "products, bf16": (TENSOR, SHORT | {"precision": "bf16"}),
    "tokens": (CONTEXT, UNEVEN),
    "tokens, window": (CONTEXT, SHORT | {"family": "mistral", "micro_batch_size": 1}),
    "tokens, capped scores": (CONTEXT, SHORT | {"family": "gemma2"}),
    "tokens, checkpointed": (CONTEXT, SHORT | {"activation_checkpointing": True}),
    "tokens, bf16": (CONTEXT, SHORT | {"precision": "bf16"}),
    "both": (BOTH, UNEVEN),
    "both, odd sizes": (BOTH, SHORT | {"config": {"intermediate_size": 46, "hidden_size": 36, "head_dim": 8}}),
}
STOPPED = {"batch_size": 4, "steps": 9, "eval_every": 2, "ema": 0.9}
DROPPED = STOPPED | BOTH | {"dropout": 0.3}


def train(folder: Path, processes: int, jobs: list[tuple[str, str, dict[str, Any]]]) -> None:
    wait_for_all([start(sharded_processes.main, folder, json.dumps(jobs), env=rank) for rank in ranks(processes)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings in four processes, and again in two that share nothing."""
    folder = tmp_path_factory.mktemp("shared")
    random_corpus(folder / "train", 25)
    random_corpus(folder / "eval", 19, seed=9)
    jobs = [(f"{name}; cut", f"{name}-c", case | mesh) for name, (mesh, case) in CASES.items()]
    jobs += [("undisturbed", "u", DROPPED), ("stopped", "r", DROPPED | {"stop_after": 5}), ("resumed", "r", DROPPED)]
    jobs += [("to-whole, stopped", "to-whole", STOPPED | BOTH | {"stop_after": 5})]
    wild = {"steps": 9, "lr": 1e30, "max_grad_norm": None, "warmup": 0}
    jobs += [("diverged", "diverged", wild | BOTH)]
    train(folder, 4, jobs)
    jobs = [(f"{name}; whole", f"{name}-w", case) for name, (_, case) in CASES.items()]
    jobs += [("plain", "plain", STOPPED), ("to-whole, resumed", "to-whole", STOPPED)]
    jobs += [("to-cut, stopped", "to-cut", STOPPED | {"stop_after": 5})]
    jobs += [("to-tensor, stopped", "to-tensor", STOPPED | {"stop_after": 5})]
    jobs += [("to-cut, resumed", "to-cut", STOPPED | CONTEXT), ("to-tensor, resumed", "to-tensor", STOPPED | TENSOR)]
    jobs += [("diverged whole", "diverged whole", wild)]
    train(folder, 2, jobs)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_they_learn_what_whole_ones_learn(name: str, folder: Path) -> None:
    rough = name.endswith("bf16")
    whole = found(folder, f"{name}; whole")[0]
    cut = found(folder, f"{name}; cut")
    assert len(cut) == 4
    require_same_course(cut, whole, rough=rough)
    one, other = load_file(folder / f"{name}; cut.safetensors"), load_file(folder / f"{name}; whole.safetensors")
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key.endswith("query_key_value.bias"):  # a key's bias has no gradient but noise, which Adam makes large
            continue
        torch.testing.assert_close(value, other[key], atol=2e-2 if rough else 2e-4, rtol=1e-3, msg=key)


def test_each_process_holds_its_part(folder: Path) -> None:
    shapes = [own["shapes"] for own in found(folder, "both, odd sizes; cut")]
    block = "model.layers.0."
    assert [own[f"{block}self_attn.q_proj.weight"] for own in shapes] == [[8, 36]] * 4, (
        "4 heads of 8 in 2 parts, over 2"
    )
    assert [own[f"{block}mlp.gate_proj.weight"][0] for own in shapes] == [12, 12, 11, 11], "23 rows of a part"
    assert [own[f"{block}mlp.down_proj.weight"] for own in shapes] == [[18, 23]] * 4
    assert [own["model.embed_tokens.weight"][0] for own in shapes] == [16, 16, 16, 13], "spread over all"


def test_stopped_and_resumed_it_ends_with_the_same_bits(folder: Path) -> None:
    stopped, resumed, before = (found(folder, name) for name in ("stopped", "resumed", "undisturbed"))
    assert [own["status"] for own in stopped] == ["StoppedError"] * 4
    assert all(own["resumed"] and own["status"] == "done" and not own["said"] for own in resumed)
    assert [own["steps"] for own in resumed] == [own["steps"][6:] for own in before]
    whole = load_file(folder / "undisturbed.safetensors")
    for key, value in load_file(folder / "resumed.safetensors").items():
        assert torch.equal(value, whole[key]), key


@pytest.mark.parametrize("place", ["to-whole", "to-cut", "to-tensor"])
def test_it_goes_on_in_another_way(place: str, folder: Path) -> None:
    resumed, expected = found(folder, f"{place}, resumed")[0], found(folder, "plain")[0]
    assert resumed["resumed"]
    assert not resumed["said"], "nothing is set aside"
    for step, other in zip(resumed["steps"], expected["steps"][6:], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], abs=1e-5)
    whole = load_file(folder / "plain.safetensors")
    for key, value in load_file(folder / f"{place}, resumed.safetensors").items():
        torch.testing.assert_close(value, whole[key], atol=2e-4, rtol=1e-3, msg=key)


def test_each_process_writes_its_rows(folder: Path) -> None:
    newest = folder / "to-whole" / "checkpoints" / "step-00000006"
    parts = [load_file(newest / f"weights-0000{part}-of-00004.safetensors") for part in (1, 2, 3, 4)]
    rows = [part["model.layers.0.mlp.down_proj.weight"].shape for part in parts]
    assert rows == [(8, 48)] * 4, "whole rows, whatever each process computes with"


def test_the_losses_of_a_diverged_step_are_of_whole_examples(folder: Path) -> None:
    def written(name: str) -> dict[str, Any]:
        [path] = (folder / name / "diverged").glob("step-*.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    assert [own["status"] for own in found(folder, "diverged")] == ["DivergedError"] * 4
    mine, expected = written("diverged"), written("diverged whole")
    assert mine["step"] == expected["step"]
    losses, others = ({e["example"]: e["loss"] for e in told["examples"]} for told in (mine, expected))
    assert losses == pytest.approx(others, abs=1e-5)
