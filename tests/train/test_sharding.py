"""Parameters spread over processes learn what whole ones learn, and any number of processes goes on from what is saved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import outcomes
import pytest
import torch
from fitting import random_corpus
from outcomes import require_same_course
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("sharded_processes.py")

CASES: dict[str, dict[str, Any]] = {
    # 25 examples in batches of 4: the seventh batch of an epoch has one example, fewer than there are processes
    "uneven": {"batch_size": 4, "steps": 9, "eval_every": 4},
    "micro-batches": {"batch_size": 5, "steps": 6, "micro_batch_size": 1, "family": "gpt2"},
    "averaged": {"batch_size": None, "batch_tokens": 90, "steps": 7, "micro_batch_tokens": 40, "ema": 0.7},
    "bf16": {"batch_size": 5, "steps": 6, "precision": "bf16", "eval_every": 3},
    "checkpointed": {"batch_size": 5, "steps": 4, "activation_checkpointing": True},
    "frozen": {"batch_size": 5, "steps": 4, "frozen": "layers.0"},
    "tied": {"batch_size": 5, "steps": 4, "config": {"tie_word_embeddings": True}},
    "sgd": {"batch_size": 5, "steps": 4, "optimizer": {"name": "sgd", "momentum": 0.9}},
}
STOPPED = {"batch_size": 4, "steps": 9, "eval_every": 2, "ema": 0.9, "sharded": True}
BF16 = STOPPED | {"precision": "bf16", "ema": None, "family": "gpt2", "dropout": 0.2}
Found = Callable[[str], list[dict[str, Any]]]


def launch(folder: Path, processes: int, jobs: list[tuple[str, str, dict[str, Any]]]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [str(SCRIPT), str(folder), json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings, in two processes, and some in one and in three."""
    folder = tmp_path_factory.mktemp("sharded")
    random_corpus(folder / "train", 25)
    random_corpus(folder / "eval", 19, seed=9)
    jobs: list[tuple[str, str, dict[str, Any]]] = []
    for name, case in CASES.items():
        jobs += [(f"{name}, whole", f"{name}-w", case), (f"{name}, spread", f"{name}-s", case | {"sharded": True})]
    for name, case in (("fp32", STOPPED), ("bf16", BF16)):
        jobs += [(f"{name}, undisturbed", f"{name}-u", case)]
        jobs += [(f"{name}, stopped", f"{name}-r", case | {"stop_after": 5}), (f"{name}, resumed", f"{name}-r", case)]
    for place in ("to-whole", "to-one", "to-three"):
        jobs += [(f"{place}, stopped", place, STOPPED | {"stop_after": 5})]
    jobs += [("to-whole, resumed", "to-whole", STOPPED | {"sharded": False})]
    jobs += [("to-spread, stopped", "to-spread", STOPPED | {"sharded": False, "stop_after": 5})]
    jobs += [("to-spread, resumed", "to-spread", STOPPED)]
    wild = {"steps": 9, "lr": 1e30, "max_grad_norm": None, "warmup": 0, "sharded": True}
    jobs += [("diverged", "diverged", wild)]
    launch(folder, 2, jobs)
    launch(folder, 1, [("to-one, resumed", "to-one", STOPPED | {"sharded": False})])
    launch(folder, 3, [("to-three, resumed", "to-three", STOPPED)])
    return folder


@pytest.fixture
def found(folder: Path) -> Found:
    """What each process found in a training."""
    return partial(outcomes.found, folder)


@pytest.mark.parametrize("name", CASES)
def test_they_learn_what_whole_ones_learn(name: str, folder: Path, found: Found) -> None:
    rough = name == "bf16"
    require_same_course(found(f"{name}, spread"), found(f"{name}, whole")[0], rough=rough)
    one, other = load_file(folder / f"{name}, spread.safetensors"), load_file(folder / f"{name}, whole.safetensors")
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key.endswith("c_attn.bias"):  # a key's bias has no gradient but noise, which Adam makes large
            continue
        torch.testing.assert_close(value, other[key], atol=2e-2 if rough else 1e-4, rtol=1e-3, msg=key)


def test_each_process_holds_its_rows(found: Found) -> None:
    spread, whole = found("uneven, spread"), found("uneven, whole")[0]
    for key, shape in whole["shapes"].items():
        rows = [own["shapes"][key][0] for own in spread]
        assert sum(rows) == shape[0], key
        assert max(rows) == -(-shape[0] // 2), key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_and_resumed_it_ends_with_the_same_bits(precision: str, folder: Path, found: Found) -> None:
    stopped, resumed = found(f"{precision}, stopped"), found(f"{precision}, resumed")
    assert [own["status"] for own in stopped] == ["StoppedError"] * 2
    assert [own["facts"]["step"] for own in stopped] == [6, 6]
    assert all(own["resumed"] and own["status"] == "done" and not own["said"] for own in resumed)
    assert resumed[0]["steps"][0]["step"] == 7
    whole = load_file(folder / f"{precision}, undisturbed.safetensors")
    for key, value in load_file(folder / f"{precision}, resumed.safetensors").items():
        assert torch.equal(value, whole[key]), key
    before = found(f"{precision}, undisturbed")[0]
    assert resumed[0]["steps"] == before["steps"][6:]


@pytest.mark.parametrize("place", ["to-whole", "to-spread", "to-one", "to-three"])
def test_it_goes_on_in_another_way(place: str, folder: Path, found: Found) -> None:
    resumed, expected = found(f"{place}, resumed")[0], found("fp32, undisturbed")[0]
    assert resumed["resumed"]
    assert not resumed["said"], "nothing is set aside"
    assert [step["step"] for step in resumed["steps"]] == [7, 8, 9]
    for step, other in zip(resumed["steps"], expected["steps"][6:], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], abs=1e-5)
    whole = load_file(folder / "fp32, undisturbed.safetensors")
    for key, value in load_file(folder / f"{place}, resumed.safetensors").items():
        torch.testing.assert_close(value, whole[key], atol=1e-4, rtol=1e-3, msg=key)


def test_each_process_writes_its_rows(folder: Path, found: Found) -> None:
    newest, plain = (folder / place / "checkpoints" / "step-00000006" for place in ("to-three", "to-spread"))
    names = {path.name for path in newest.glob("*.safetensors")}
    parts = [f"{kind}-0000{part}-of-00002.safetensors" for kind in ("weights", "optimizer") for part in (1, 2)]
    assert names == {*parts, "best.safetensors"}
    for kind in ("weights", "optimizer"):
        own = [load_file(newest / f"{kind}-0000{part}-of-00002.safetensors") for part in (1, 2)]
        for key, whole in load_file(plain / f"{kind}.safetensors").items():
            rows = [part[key] for part in own if key in part]
            assert torch.cat(rows).shape == whole.shape if whole.ndim else len(rows) == 1, key
            assert max(map(len, rows)) <= -(-len(whole) // 2) if whole.ndim else True, key


def test_divergence_is_written_out(folder: Path, found: Found) -> None:
    assert [own["status"] for own in found("diverged")] == ["DivergedError"] * 2
    [written] = (folder / "diverged" / "diverged").glob("step-*.json")
    assert len(json.loads(written.read_text())["examples"]) == 8
