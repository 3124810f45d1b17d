"""Signals to a real process: it says within what time it stops, keeps to that, and the same command goes on from there."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Cli
from forked import Forked, llmkit, wait_until

from llmkit.run.checkpoint import checked_manifest, published, step_of
from llmkit.run.log import read_metrics

pytestmark = pytest.mark.slow
SETTINGS = (
    *("name=one", "data.eval=20%", "finetune.steps=STEPS", "finetune.lr=1e-3", "finetune.log_every=1"),
    *("finetune.trackers=[]", "finetune.dropout=0.1", "finetune.schedule=constant", "finetune.warmup=0"),
)


@dataclass
class Process:
    """A training in a process of its own."""

    run: Path
    command: list[str]

    def start(self) -> Forked:
        return llmkit(*self.command, "-o", self.run)

    def wait_for_steps(self, process: Forked, steps: int) -> None:
        wait_until(lambda: len(read_metrics(self.run / "metrics.jsonl")) >= steps, process)

    def reached(self) -> int:
        step: int = read_metrics(self.run / "metrics.jsonl")[-1]["step"]
        return step


@pytest.fixture
def training(tiny_llama: Path, chat_rows: Path, tmp_path: Path) -> Callable[..., Process]:
    def make(steps: int, *more: str) -> Process:
        told = [setting.replace("STEPS", str(steps)) for setting in (*SETTINGS, *more)]
        words = ["finetune", "-m", str(tiny_llama), "-d", str(chat_rows)]
        return Process(tmp_path / "run", words + [w for s in told for w in ("--set", s)])

    return make


def state(run: Path) -> str:
    found: str = json.loads((run / "run.json").read_text())["stages"]["finetune"]["state"]
    return found


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGUSR1, 75, "SIGUSR1"), (signal.SIGINT, 130, "Ctrl-C")],
)
def test_it_stops_within_the_time_it_says_and_goes_on_exactly(
    training: Callable[..., Process], cli: Cli, tmp_path: Path, number: signal.Signals, code: int, name: str
) -> None:
    own = training(100_000)
    process = own.start()
    own.wait_for_steps(process, 30)
    process.send_signal(number)
    sent = time.monotonic()
    assert process.wait() == code
    took = time.monotonic() - sent
    said = process.err
    bound = re.search(rf"{name}: training stops after this step and saves, within about (\d+) s", said)
    assert bound is not None, said
    assert took <= int(bound[1]) + 300, "but for a busy machine"
    assert ("Ctrl-C again" in said) == (number == signal.SIGINT)
    reached = own.reached()
    assert f"stopped by {name} after step {reached}, which is saved" in said
    assert state(own.run) == "stopped"
    assert [step_of(path) for path in published(own.run / "finetune" / "checkpoints")] == [reached]
    steps = reached + 10
    again = cli(*training(steps).command, "-o", own.run, "--resume-anyway")
    assert again.code == 0, again.err
    whole = cli(*training(steps).command, "-o", tmp_path / "whole")
    assert whole.code == 0, whole.err
    runs = (own.run, tmp_path / "whole")
    weights = [(run / "finetune" / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    logs = [[(line["step"], line.get("loss")) for line in read_metrics(run / "metrics.jsonl")] for run in runs]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("times", [2, 40], ids=["twice", "again and again"])
def test_a_second_ctrl_c_stops_at_once_and_loses_nothing_that_was_published(
    training: Callable[..., Process], times: int
) -> None:
    own = training(100_000, "finetune.save_every=20", "finetune.keep_checkpoints=3")
    process = own.start()
    own.wait_for_steps(process, 70)
    before = {path.name for path in published(own.run / "finetune" / "checkpoints")}
    for _ in range(times):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
    assert process.wait() == 130, process.err
    assert "Traceback" not in process.err
    left = published(own.run / "finetune" / "checkpoints")
    assert len(before & {path.name for path in left}) >= 2
    for path in left:
        checked_manifest(path)
    assert state(own.run) == "stopped"
    again = own.start()
    wait_until(lambda: f"going on after step {step_of(left[0])} of" in again.err, again)
    again.kill()
    again.wait()


def test_a_second_run_is_refused_by_the_pid_and_a_killed_one_leaves_no_lock(
    training: Callable[..., Process], cli: Cli
) -> None:
    own = training(100_000, "finetune.save_every=10")
    process = own.start()
    own.wait_for_steps(process, 15)
    refused = cli(*own.command, "-o", own.run, "--json")
    assert refused.code == 5
    assert refused.json["what"] == "the run directory is in use"
    assert f"process {process.pid} on " in refused.json["got"]
    assert process.poll() is None, "the first one goes on"
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = own.start()
    wait_until(lambda: "going on after step" in again.err, again)
    again.send_signal(signal.SIGTERM)
    assert again.wait() == 75
