"""Two processes compute the frozen prefix together, and learn as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked import llmkit, ranks, wait_for_all

from llmkit.data.states import States

pytestmark = pytest.mark.slow
SETTINGS = (
    "freeze={blocks: 0, embeddings: true}",
    "data.eval=20%",
    "finetune.epochs=3",
    "finetune.lr=1e-2",
    "finetune.eval_every=6",
    "finetune.precision=fp32",
)


def finetune(
    processes: int, model: Path, rows: Path, folder: Path, *, torchrun: bool = False
) -> tuple[dict[str, Any], str]:
    """What a fine-tuning measured and said."""
    words = ["finetune", "--model", str(model), "--data", str(rows), "-o", str(folder), "--json"]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    cache = {"XDG_CACHE_HOME": str(folder.parent / f"cache-{processes}")}
    if torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | cache
        done = subprocess.run([*command, "-m", "llmkit", *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        out, err = done.stdout, done.stderr
    else:
        started = [llmkit(*words, env=place | cache) for place in (ranks(processes) if processes > 1 else [{}])]
        wait_for_all(started)
        out, err = started[0].out, "".join(process.err for process in started)
    return json.loads(out.splitlines()[-1])["metrics"], err


def test_two_processes_keep_states_together(tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    alone, _ = finetune(1, tiny_llama, chat_rows, tmp_path / "one")
    both, said = finetune(2, tiny_llama, chat_rows, tmp_path / "two", torchrun=True)
    assert "the states of the training data took" in said
    assert both["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-5)
    for folder in (tmp_path / "cache-2" / "llmkit" / "prefix").iterdir():
        states = States(folder)
        assert states.complete
        assert sorted(path.name for path in folder.glob("part-*")) == ["part-00000.bin", "part-00001.bin"]
    again, said = finetune(2, tiny_llama, chat_rows, tmp_path / "again")
    assert "are there from before" in said
    assert again["eval_loss"] == both["eval_loss"]


def test_damage_is_mended_together(tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> None:
    first, _ = finetune(2, tiny_llama, chat_rows, tmp_path / "first")
    part = next((tmp_path / "cache-2" / "llmkit" / "prefix").glob("*/part-00001.bin"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    second, said = finetune(2, tiny_llama, chat_rows, tmp_path / "second")
    assert "computed again" in said
    assert second["eval_loss"] == first["eval_loss"]
