"""--max-time: stopped in time and after saving, with code 75, and the same command goes on from there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from forked import llmkit

from llmkit.recipe.training import Training
from llmkit.run.checkpoint import Checkpoints
from llmkit.run.log import read_metrics
from llmkit.stages import preprocess
from llmkit.train import when
from llmkit.train.loop import Fit

STEP, LIMIT = 60.0, "15min"  # 30 steps take longer, whatever they really take


@pytest.fixture
def command(tiny_llama: Path, chat_rows: Path) -> tuple[object, ...]:
    settings = (
        *("name=one", "data.eval=20%", "finetune.steps=30", "finetune.lr=1e-3", "finetune.log_every=1"),
        *("finetune.eval_every=7", "finetune.trackers=[]", "finetune.dropout=0.1"),
    )
    return ("finetune", "-m", tiny_llama, "-d", chat_rows, *(word for each in settings for word in ("--set", each)))


class Clock:
    """The time as the command sees it; it passes faster where something is to take long."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._real, self._ahead, self.running = time.monotonic, 0.0, True
        patch.setattr(time, "monotonic", lambda: self._real() + self._ahead)

    def pass_by(self, seconds: float) -> None:
        self._ahead += seconds if self.running else 0.0

    def delay(self, patch: pytest.MonkeyPatch, place: Any, name: str, seconds: float) -> None:
        """A method takes so much longer."""
        real = getattr(place, name)

        def late(*given: Any) -> Any:
            self.pass_by(seconds)
            return real(*given)

        patch.setattr(place, name, late)


@pytest.fixture
def slow_steps() -> Iterator[Clock]:
    """Steps that take STEP seconds, so that all of them take longer than LIMIT."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        clock.delay(patch, Fit, "_step", STEP)
        yield clock


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("save_seconds", [0.0, 70.0])
def test_it_stops_in_time_and_goes_on_exactly(
    command: tuple[object, ...],
    cli: Cli,
    tmp_path: Path,
    slow_steps: Clock,
    save_seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli(*command, "-o", whole).code == 0
    slow_steps.delay(monkeypatch, Checkpoints, "_publish", save_seconds)
    started = time.monotonic()
    stopped = cli(*command, "-o", parts, "--max-time", LIMIT, "--json")
    assert stopped.code == 75, stopped.out
    assert time.monotonic() - started <= 900
    assert stopped.json["kind"] == "stopped"
    assert "the time limit" in stopped.json["what"]
    assert "saved" in stopped.json["what"]
    reached = len(steps_of(parts))
    assert 1 <= reached < 30
    assert json.loads((parts / "run.json").read_text())["stages"]["finetune"]["state"] == "stopped"
    again = cli(*command, "-o", parts)
    assert again.code == 0, again.err
    assert f"going on after step {reached} of 30" in again.err
    weights = [(run / "finetune" / "model" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]
    assert steps_of(parts) == steps_of(whole) == list(range(1, 31))


@pytest.mark.slow
def test_a_limit_of_seconds_on_the_real_clock(command: tuple[object, ...], cli: Cli, tmp_path: Path) -> None:
    run, steps = tmp_path / "run", ("--set", "finetune.steps=1000000")
    process = llmkit(*command, *steps, "-o", run, "--max-time", "6s", "--json")
    assert process.wait() == 75, process.err
    assert "the time limit" in json.loads(process.out)["what"]
    assert json.loads((run / "run.json").read_text())["process"]["pid"] == process.pid


@pytest.mark.parametrize("step_seconds", [0.1, 3.0, 11.0])
@pytest.mark.parametrize("save_seconds", [0.0, 4.0, 30.0])
def test_the_step_after_which_to_stop_leaves_time_for_saving(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, save_seconds: float
) -> None:
    """On a clock that is set by hand: the checkpoint stands before the limit, and not more than two steps before that."""
    now = [time.monotonic()]
    monkeypatch.setattr(when.time, "monotonic", lambda: now[0])
    deadline = now[0] + 100.0
    times = when.Times(Training(), 0, deadline, slowest_save=save_seconds)
    stops, steps = False, 0
    while not stops and steps < 2000:
        stops = times.must_stop()  # of the step that comes, after which it is saved
        now[0] += step_seconds
        times.slowest_step, steps = max(times.slowest_step, step_seconds), steps + 1
    assert stops
    assert deadline - 2 * step_seconds - 0.2 <= now[0] + save_seconds <= deadline


def test_again_and_again_it_comes_to_the_end(
    command: tuple[object, ...], cli: Cli, tmp_path: Path, slow_steps: Clock
) -> None:
    """A chain of jobs on a cluster, each of which has a limit."""
    run, reached = tmp_path / "run", [0]
    for _ in range(15):
        done = cli(*command, "-o", run, "--max-time", LIMIT)
        if done.code == 0:
            break
        assert done.code == 75, done.err
        reached.append(len(steps_of(run)))
        assert reached[-1] > reached[-2], "each of them gets further"
    assert done.code == 0
    assert len(reached) > 2
    assert steps_of(run) == list(range(1, 31))


def test_a_stage_that_does_not_train_stops_too(
    command: tuple[object, ...], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_for = preprocess.settings_for

    def late(*given: Any) -> Any:
        time.sleep(3600)
        return settings_for(*given)

    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "settings_for", late)
        stopped = cli(*command, "-o", tmp_path / "run", "--max-time", "1s", "--json")
    assert (stopped.code, stopped.json["kind"]) == (75, "stopped")
    assert "the time limit" in stopped.json["what"]
    assert cli(*command, "-o", tmp_path / "run", "--set", "finetune.steps=2").code == 0


def test_enough_time_changes_nothing_and_no_alarm_stays(command: tuple[object, ...], cli: Cli, tmp_path: Path) -> None:
    import signal

    runs = [tmp_path / "with", tmp_path / "without"]
    short = (*command, "--set", "finetune.steps=4")
    assert cli(*short, "-o", runs[0], "--max-time", "1h").code == 0
    assert cli(*short, "-o", runs[1]).code == 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
    weights = [(run / "finetune" / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_the_limit_is_no_input_of_a_training(
    command: tuple[object, ...], cli: Cli, tmp_path: Path, slow_steps: Clock
) -> None:
    """Another limit, or none, goes on from what there is, and what is done is not done again."""
    run = tmp_path / "run"
    assert cli(*command, "-o", run, "--max-time", LIMIT).code == 75
    slow_steps.running = False
    assert "going on after step" in cli(*command, "-o", run, "--max-time", "2h").err
    again = cli(*command, "-o", run, "--max-time", "3h")
    assert "finetune unchanged" in again.err


@pytest.mark.parametrize("given", ["0s", "soon", "-3s", "10", ""])
def test_a_limit_that_is_no_time_is_refused(command: tuple[object, ...], cli: Cli, tmp_path: Path, given: str) -> None:
    refused = cli(*command, "-o", tmp_path / "run", "--max-time", given, "--json")
    assert refused.code == 2, refused.out
    assert "max" in refused.out
