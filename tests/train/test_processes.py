"""Two processes with the same global batch take the same steps as one, over gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes
from fitting import random_corpus
from forked import ranks, start, wait_for_all
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    # 25 examples in batches of 4: the seventh batch of an epoch has one example, fewer than there are processes
    "uneven": {"batch_size": 4, "steps": 9, "eval_every": 4},
    "micro-batches": {"batch_size": 5, "steps": 6, "micro_batch_size": 1, "family": "gpt2"},
    "one example a step": {"batch_size": 1, "steps": 4},
    "by tokens": {"batch_size": None, "batch_tokens": 90, "steps": 7, "micro_batch_tokens": 40, "ema": 0.7},
    "bf16": {"batch_size": 5, "steps": 6, "precision": "bf16", "eval_every": 3},
}
NEAR = {"loss": {"abs": 1e-5}, "grad_norm": {"rel": 1e-3}}
ROUGH = {"loss": {"rel": 1e-2}, "grad_norm": {"rel": 3e-2}}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    random_corpus(folder / "train", 25)
    random_corpus(folder / "eval", 19, seed=9)
    return folder


def launch(folder: Path, processes: int, case: dict[str, Any], *, torchrun: bool = False) -> list[dict[str, Any]]:
    """What each process found."""
    folder.mkdir(exist_ok=True)
    words = (str(folder), json.dumps(case))
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [*command, two_processes.__file__, *words], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        places = ranks(processes) if processes > 1 else [{}]
        wait_for_all([start(two_processes.main, *words, env=place) for place in places])
    found = [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(processes)]
    assert all(own["processes"] == processes for own in found)
    return found


def weights(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"weights-{rank}.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(corpora: Path, name: str) -> None:
    case = CASES[name] | {"keep": "last"}
    near = ROUGH if name == "bf16" else NEAR
    [alone] = launch(corpora / f"{name}-1", 1, case)
    both = launch(corpora / f"{name}-2", 2, case, torchrun=name == "uneven")
    for own in both:
        assert own["status"] == alone["status"] == "done"
        for step, expected in zip(own["steps"], alone["steps"], strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], **near["loss"])
            assert step["grad_norm"] == pytest.approx(expected["grad_norm"], **near["grad_norm"])
            assert (step["tokens"], step["lr"]) == (expected["tokens"], expected["lr"])
        assert own["facts"]["supervised"] == alone["facts"]["supervised"]
        for (step, loss), (expected_step, expected_loss) in zip(own["evaluations"], alone["evaluations"], strict=True):
            assert step == expected_step
            assert loss == pytest.approx(expected_loss, **near["loss"])
    first, second = (weights(corpora / f"{name}-2", rank) for rank in range(2))
    single = weights(corpora / f"{name}-1", 0)
    for key, value in first.items():
        assert torch.equal(value, second[key]), "both processes hold the same weights"
        if near is NEAR and not key.endswith(
            "c_attn.bias"
        ):  # a key's bias has no gradient but noise, which Adam makes large
            torch.testing.assert_close(value, single[key], atol=1e-4, rtol=1e-3, msg=key)


def test_when_one_process_runs_out_of_memory_both_take_smaller_parts(corpora: Path) -> None:
    case = {"batch_size": 9, "steps": 5, "keep": "last"}
    [alone] = launch(corpora / "enough", 1, case)
    both = launch(corpora / "short", 2, case | {"short_of_memory": {"process": 1, "tokens": 40}})
    assert [own["status"] for own in both] == ["done"] * 2
    limits = {own["facts"]["micro_batch_tokens"] for own in both}
    assert len(limits) == 1
    assert 20 <= limits.pop() <= 40
    for own in both:
        assert [s["step"] for s in own["steps"]] == [1, 2, 3, 4, 5]
        for step, expected in zip(own["steps"], alone["steps"], strict=True):
            assert step["loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert step["tokens"] == expected["tokens"]
    for key, value in weights(corpora / "short", 0).items():
        assert torch.equal(value, weights(corpora / "short", 1)[key])
        torch.testing.assert_close(value, weights(corpora / "enough", 0)[key], atol=1e-4, rtol=1e-3, msg=key)


def test_a_signal_to_one_process_stops_both_and_they_resume_exactly(corpora: Path) -> None:
    case = {"batch_size": 4, "steps": 9, "eval_every": 2, "family": "gpt2", "dropout": 0.2, "keep": "best"}
    launch(corpora / "whole", 2, case)
    stopped = launch(corpora / "parts", 2, case | {"stop_after": 5})
    assert [own["status"] for own in stopped] == ["StoppedError"] * 2
    assert [own["facts"]["step"] for own in stopped] == [6, 6]
    damaged = corpora / "parts" / "fit" / "checkpoints" / "step-00000009"
    shutil.copytree(damaged.with_name("step-00000006"), damaged)
    (damaged / "state.json").write_text("{}")
    resumed = launch(corpora / "parts", 2, case)
    assert [own["status"] for own in resumed] == ["done"] * 2
    assert resumed[0]["steps"][0]["step"] == 7, "the damaged checkpoint is set aside by one of the processes"
    for rank in range(2):
        whole, parts = weights(corpora / "whole", rank), weights(corpora / "parts", rank)
        assert all(torch.equal(value, parts[key]) for key, value in whole.items())
