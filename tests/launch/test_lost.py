"""Processes that a launcher started which does not watch them: what is left of them tells why it ends, and ends in time."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forked, llmkit, ranks

pytestmark = pytest.mark.slow

RECIPE = """
name: lost
task: text
stages: [preprocess, pretrain]
data: {train: DATA, eval: 8, max_length: 32, leaks: "off"}
pretrain:
  architecture: {model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 32}
  tokenizer: {train: bpe, vocab_size: 300}
  steps: 20000
  batch_size: 4
  precision: fp32
  lr: 1.0e-3
  log_every: 1
  trackers: []
launch: {hang_after: 2s, connect_within: 30s}
"""
GONE = "another process of this training is gone, or does not answer"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data, path = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    data.write_text("".join(json.dumps({"text": f"number {n} and then {n * 7 % 13}. " * 3}) + "\n" for n in range(60)))
    path.write_text(RECIPE.replace("DATA", str(data)))
    return path


@pytest.fixture
def two(recipe: Path, tmp_path: Path) -> Callable[[], list[Forked]]:
    """Starts a training in two processes."""
    return lambda: [llmkit("run", recipe, "-o", tmp_path / "run", env=place) for place in ranks(2)]


def training(processes: list[Forked], run: Path) -> None:
    """Waits until both have taken steps."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        beats = list((run / "pretrain").glob(".beat-*"))
        if len(beats) == 2 and all(beat.read_text() > "2" for beat in beats if beat.exists()):
            return
        assert all(process.poll() is None for process in processes), [process.err for process in processes]
        time.sleep(0.05)
    raise AssertionError("they did not come to train")


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_is_killed_the_other_says_so(two: Callable[[], list[Forked]], tmp_path: Path, rank: int) -> None:
    processes = two()
    training(processes, tmp_path / "run")
    processes[rank].kill()
    left = processes[1 - rank]
    assert left.wait(60) == 5, left.err
    assert GONE in left.err
    assert "last checkpoint" in left.err
    assert not (tmp_path / "run" / "error.log").exists()


def test_when_one_hangs_the_other_ends_in_bounded_time(two: Callable[[], list[Forked]], tmp_path: Path) -> None:
    processes = two()
    training(processes, tmp_path / "run")
    processes[1].send_signal(signal.SIGSTOP)
    try:
        assert processes[0].wait(60) == 5, processes[0].err
        assert GONE in processes[0].err
        assert "Timed out waiting" in processes[0].err
    finally:
        processes[1].kill()
    assert processes[1].wait(60) == -signal.SIGKILL


def test_the_one_that_waits_for_a_failure_of_the_first_is_not_at_fault(
    two: Callable[[], list[Forked]], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("{\n")
    first, second = two()
    assert first.wait(60) == 3, first.err
    assert second.wait(60) == 5, second.err
    assert GONE in second.err
    assert GONE not in first.err


def test_a_signal_to_the_one_that_waits_ends_it(recipe: Path, tmp_path: Path) -> None:
    alone = llmkit("run", recipe, "-o", tmp_path / "run", env=ranks(2)[1])
    time.sleep(3)
    assert alone.poll() is None, "it waits for the first"
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(20) == 75, alone.err


def test_a_port_in_use(recipe: Path, tmp_path: Path) -> None:
    places = ranks(2)
    with socket.socket() as taken:
        taken.bind(("", int(places[0]["MASTER_PORT"])))
        taken.listen()
        words = ("run", recipe, "-o", tmp_path / "run", "--set", "launch.connect_within=3s")
        first, second = (llmkit(*words, env=place) for place in places)
        assert first.wait(60) == 5, first.err
        assert second.wait(60) == 5, second.err
    assert "the port of the first process is in use" in first.err
    assert "set MASTER_PORT to a free port" in first.err
    assert "the first process does not answer" in second.err


def test_a_place_that_makes_no_sense_is_the_command_s_fault(recipe: Path, tmp_path: Path) -> None:
    place = ranks(2)[1] | {"RANK": "7"}
    wrong = llmkit("run", recipe, "-o", tmp_path / "run", env=place)
    assert wrong.wait(60) == 2
    assert "RANK is 7, and WORLD_SIZE 2" in wrong.err


def test_the_probe_by_itself() -> None:
    first, second = (llmkit("probe", "--json", env=place) for place in ranks(2))
    assert (first.wait(60), second.wait(60)) == (0, 0), first.err + second.err
    found = json.loads(first.out)
    assert [each["rank"] for each in found["processes"]] == [0, 1]
    assert found["speed"]["bytes_a_second"] > 0
    assert not second.out, "the first tells it"
    wrong = llmkit("probe", "--within", "soon")
    assert wrong.wait(60) == 2
    assert "such as `10min`" in wrong.err
