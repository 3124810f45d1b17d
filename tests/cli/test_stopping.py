"""Stopped by a signal: the exit code says how, what was learnt is saved, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Outcome
from forked import LONG

from llmkit.run.log import read_metrics

SETTINGS = ("data.eval=20%", "finetune.steps=12", "finetune.lr=1e-3", "finetune.log_every=1", "finetune.eval_every=5")
SIGNALS = [(signal.SIGTERM, 75, "stopped"), (signal.SIGUSR1, 75, "stopped"), (signal.SIGINT, 130, "interrupted")]
by_signal = pytest.mark.parametrize(("number", "code", "kind"), SIGNALS, ids=lambda value: str(value))


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """As on a terminal: a shell starts what it runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(tiny_llama: Path, chat_rows: Path) -> tuple[object, ...]:
    options = [word for setting in SETTINGS for word in ("--set", setting)]
    return ("finetune", "-m", tiny_llama, "-d", chat_rows, *options)


def state(run: Path, stage: str = "finetune") -> str:
    found: str = json.loads((run / "run.json").read_text())["stages"][stage]["state"]
    return found


def signal_after(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends this process a signal when a step has been done."""
    from llmkit.train.hooks.progress import ProgressHook

    done = ProgressHook.after_step

    def after_step(self: Any, train_state: Any, values: dict[str, Any]) -> None:
        done(self, train_state, values)
        if train_state.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ProgressHook, "after_step", after_step)


def check_stopped(outcome: Outcome, code: int, kind: str, run: Path) -> None:
    assert outcome.code == code, outcome.err
    said = outcome.json
    assert (said["status"], said["kind"], said["exit_code"]) == ("error", kind, code)
    assert "run the same command again" in said["hint"]
    assert "Traceback" not in outcome.err
    assert not (run / "error.log").exists()


@by_signal
def test_the_same_command_goes_on_and_ends_with_the_same_bits(
    number: int, code: int, kind: str, command: tuple[object, ...], cli: Cli, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(*command, "-o", whole, "--set", "name=one").code == 0
    with pytest.MonkeyPatch.context() as patch:
        signal_after(7, number, patch)
        stopped = cli(*command, "-o", parts, "--set", "name=one", "--json")
    check_stopped(stopped, code, kind, parts)
    assert "saved" in stopped.json["what"]
    assert state(parts) == "stopped"
    assert not (parts / "finetune" / "model").exists()
    again = cli(*command, "-o", parts, "--set", "name=one")
    assert again.code == 0, again.err
    assert "finetune resumed: going on after step " in again.err
    assert state(parts) == "done"
    weights = [(run / "finetune" / "model" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]
    logs = [
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(run / "metrics.jsonl")]
        for run in (whole, parts)
    ]
    assert logs[0] == logs[1]


def test_no_resume_begins_at_the_first_step(
    command: tuple[object, ...], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signal_after(7, signal.SIGTERM, patch)
        assert cli(*command, "-o", tmp_path / "run").code == 75
    again = cli(*command, "-o", tmp_path / "run", "--no-resume")
    assert again.code == 0, again.err
    assert "resumed" not in again.err
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, 13))


def test_a_checkpoint_of_other_inputs_is_not_gone_on_from(
    command: tuple[object, ...], cli: Cli, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        signal_after(7, signal.SIGTERM, patch)
        assert cli(*command, "-o", tmp_path / "run").code == 75
    refused = cli(*command, "-o", tmp_path / "run", "--set", "seed=5")
    assert refused.code == 2
    assert "changed: seed 17 -> 5" in refused.err
    assert "--resume-anyway" in refused.err
    changed = cli(*command, "-o", tmp_path / "run", "--set", "seed=5", "--no-resume")
    assert changed.code == 0, changed.err
    assert "resumed" not in changed.err
    assert list((tmp_path / "run" / "previous").iterdir())


@by_signal
def test_a_stage_that_does_not_train_stops_too(
    number: int, code: int, kind: str, command: tuple[object, ...], cli: Cli, tmp_path: Path
) -> None:
    from llmkit.stages import preprocess

    run = tmp_path / "run"
    settings_for = preprocess.settings_for

    def interrupted(*arguments: Any) -> Any:
        os.kill(os.getpid(), number)
        return settings_for(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preprocess, "settings_for", interrupted)
        check_stopped(cli(*command, "-o", run, "--json"), code, kind, run)
    assert state(run, "preprocess") == "stopped"
    done = cli(*command, "-o", run)
    assert done.code == 0, done.err
    assert "preprocess running: it did not finish" in done.err


@pytest.mark.slow
def test_a_process_that_is_terminated_saves_and_goes_on(command: tuple[object, ...], cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [str(word).replace("finetune.steps=12", "finetune.steps=100000") for word in command]
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", *words, "-o", run, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + LONG
    while len(read_metrics(run / "metrics.jsonl")) < 20 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=LONG)
    check_stopped(Outcome(process.returncode, out, err), 75, "stopped", run)
    reached = read_metrics(run / "metrics.jsonl")[-1]["step"]
    short = (*words, "-o", run)
    with pytest.MonkeyPatch.context() as patch:
        signal_after(reached + 5, signal.SIGTERM, patch)
        again = cli(*short)
    assert again.code == 75
    assert f"going on after step {reached} of 100000" in again.err


@pytest.mark.parametrize("word", ["run", "finetune", "crossval", "generate"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_any_stage_ends_what_can_be_run_again(word: str, number: signal.Signals) -> None:
    """A cluster may send one while everything is still imported: the job is to be put back into the queue."""
    script = "import os, sys; from llmkit.cli import app; number = int(sys.argv.pop()); "
    script += "app.app = lambda **options: os.kill(os.getpid(), number); app.main()"
    done = subprocess.run([sys.executable, "-c", script, word, str(int(number))], capture_output=True, text=True)
    assert done.stdout == ""
    if word == "generate":
        assert (done.returncode, done.stderr) == (-number, "")
    else:
        assert done.returncode == 75
        assert done.stderr == f"llmkit: stopped by {number.name}; run the same command again to go on\n"
