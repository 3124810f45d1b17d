"""metrics.jsonl as curves: bounded, whatever its length, and no extreme is lost."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llmkit.report.log import BUCKETS, Curve, read_log


def write_lines(path: Path, lines: list[object]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_curves_by_stage_and_name(tmp_path: Path) -> None:
    log = read_log(
        write_lines(
            tmp_path / "metrics.jsonl",
            [
                {"stage": "pretrain", "step": 1, "loss": 4.0, "lr": 0.1},
                {"stage": "finetune", "step": 1, "loss": 3.0},
                {"stage": "finetune", "step": 2, "loss": 1.0},
                {"stage": "finetune", "step": 2, "eval_loss": 2.0},
                {"stage": "finetune", "step": 3, "loss": 2.0},
                {"stage": "finetune", "step": 3, "event": "skipped", "why": "a spike"},
                {"stage": "finetune", "step": 4, "loss": None},
            ],
        )
    )
    assert {stage: set(curves) for stage, curves in log.curves.items()} == {
        "pretrain": {"loss", "lr"},
        "finetune": {"loss", "eval_loss"},
    }
    loss = log.curves["finetune"]["loss"]
    assert (loss.first, loss.last, loss.lowest, loss.highest) == ((1, 3.0), (3, 2.0), (2, 1.0), (1, 3.0))
    assert loss.points().steps.tolist() == [1, 2, 3]
    assert loss.points().mean.tolist() == [3, 1, 2]
    assert not loss.points().is_thinned
    assert log.events == [{"stage": "finetune", "step": 3, "event": "skipped", "why": "a spike"}]


def test_no_log_and_damaged_lines(tmp_path: Path) -> None:
    assert read_log(tmp_path / "none.jsonl").curves == {}
    lines = [{"stage": "finetune", "step": 1, "loss": 1.0}, "{", "[1]", '{"stage": "finetune"}', "", '{"stage": "fine']
    log = read_log(write_lines(tmp_path / "metrics.jsonl", [*lines, {"stage": "finetune", "step": 2, "loss": 2.0}]))
    assert log.curves["finetune"]["loss"].last == (2, 2.0)
    assert log.unreadable == 4


@pytest.mark.parametrize("chunk", [1, 700, 100_000])
def test_a_long_curve_keeps_its_extremes_its_mean_and_its_ends(chunk: int) -> None:
    steps = np.arange(1, 60_001, dtype=np.float64)
    values = np.sin(steps / 3000) + np.random.default_rng(0).normal(0, 0.1, len(steps))
    values[41_234], values[777] = 50.0, -50.0
    curve = Curve()
    for start in range(0, len(steps), max(chunk, 50)):
        curve.add(steps[start : start + max(chunk, 50)], values[start : start + max(chunk, 50)])
    points = curve.points()
    assert len(points.steps) <= BUCKETS
    assert points.is_thinned
    assert points.high.max() == curve.highest[1] == 50.0
    assert points.low.min() == curve.lowest[1] == -50.0
    assert curve.highest[0] == 41_235
    assert (curve.first, curve.last) == ((1, values[0]), (60_000, values[-1]))
    assert np.all(np.diff(points.steps) > 0)
    assert np.all((points.low <= points.mean) & (points.mean <= points.high))
    assert points.mean.mean() == pytest.approx(values.mean(), abs=0.02)
    assert np.abs(points.mean - np.sin(points.steps / 3000)).max() < 0.6  # the buckets with the spikes too


def test_what_is_not_finite_is_left_out() -> None:
    curve = Curve()
    curve.add(np.arange(3.0), np.array([np.nan, np.inf, 1.0]))
    curve.add(np.arange(2.0), np.array([np.nan, np.nan]))
    assert (curve.count, curve.first, curve.lowest) == (1, (2, 1.0), (2, 1.0))


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = (
        '{{"stage": "pretrain", "step": {}, "loss": 2.5, "lr": 0.001, "grad_norm": 1.0, "tokens_per_second": 100.0}}\n'
    )
    event = '{{"stage": "pretrain", "step": {}, "event": "skipped", "why": "a spike"}}\n'
    with path.open("w") as file:
        for step in range(1, 80_001):
            file.write(line.format(step))
            if step % 10 == 0:
                file.write(event.format(step))
    tracemalloc.start()
    log = read_log(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert log.event_counts["pretrain", "skipped"] == 8_000
    assert len(log.events) == 200
    assert log.curves["pretrain"]["loss"].count == 80_000
    assert peak < 60 << 20  # a chunk of 4 MiB as Python objects; all of the file would be twice as much
