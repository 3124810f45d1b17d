"""What trainings in several processes found, as `sharded_processes` writes it, and whether it is the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

Outcome = dict[str, Any]


def found(folder: Path, name: str) -> list[Outcome]:
    """What each process found in a training."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}-[0-9].json"))]


def require_same_course(those: Sequence[Outcome], expected: Outcome, *, rough: bool) -> None:
    """All learnt from the same tokens, with the same losses and norms: to 1e-5, or as bf16 has them."""
    for one in those:
        assert one["status"] == "done", one["said"]
        for step, other in zip(one["steps"], expected["steps"], strict=True):
            assert step["loss"] == pytest.approx(other["loss"], abs=1e-2 if rough else 1e-5)
            assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=3e-2 if rough else 1e-4)
            assert (step["tokens"], step["lr"]) == (other["tokens"], other["lr"])
        for (step, loss), (other_step, other) in zip(one["evaluations"], expected["evaluations"], strict=True):
            assert (step, loss) == (other_step, pytest.approx(other, abs=1e-2 if rough else 1e-5))
