"""metrics.jsonl has each step once, whatever was killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmkit.run.log import MetricsLog, read_metrics


def steps(path: Path, stage: str = "finetune") -> list[int]:
    return [line["step"] for line in read_metrics(path) if line["stage"] == stage]


def test_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, "finetune", step=0)
    log.write(1, {"loss": 2.5, "grad_norm": None})
    log.write(2, {"loss": 2.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"stage": "finetune", "step": 1, "loss": 2.5, "grad_norm": None},
        {"stage": "finetune", "step": 2, "loss": 2.25},
    ]


def test_resuming_forgets_what_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, "finetune", step=0)
    for step in range(1, 8):
        log.write(step, {"loss": float(step)})
    log.write(6, {"eval_loss": 1.0})
    log = MetricsLog(path, "finetune", step=5)
    assert steps(path) == [1, 2, 3, 4, 5]
    log.write(6, {"loss": 6.5})
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    assert read_metrics(path)[-1]["loss"] == 6.5


def test_other_stages_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsLog(path, "pretrain", step=0)
    for step in (1, 2, 3):
        first.write(step, {})
    second = MetricsLog(path, "finetune", step=0)
    second.write(1, {})
    assert steps(path, "pretrain") == [1, 2, 3]
    MetricsLog(path, "finetune", step=0)
    assert steps(path) == []
    assert steps(path, "pretrain") == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, "finetune", step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [1, 2] if cut > 1 else [1, 2, 3]  # without its line break alone, a line is whole
    assert steps(path) == kept
    log = MetricsLog(path, "finetune", step=9)
    log.write(4, {})
    assert steps(path) == [*kept, 4]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_number_that_is_not_finite_is_no_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", "finetune", step=0)
    with pytest.raises(ValueError):
        log.write(1, {"loss": float("nan")})


def test_there_is_no_file_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
