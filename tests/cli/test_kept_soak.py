"""A short soak: see tests/soak.py, and `make soak` for a long one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def soak(folder: Path, *options: object) -> dict[str, dict[str, int]]:
    """In a process of its own, as what is forked must not have computed anything."""
    command = [sys.executable, "-m", "tests.soak", "--folder", folder, "--json", folder / "counts.json", *options]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    counts: dict[str, dict[str, int]] = json.loads((folder / "counts.json").read_text())
    return counts


def check(counts: dict[str, dict[str, int]], kills: int) -> None:
    assert sum(count["kills"] for count in counts.values()) >= kills
    for name in ("differences", "unreadable", "lost_checkpoints", "left_over"):
        assert {kind: count[name] for kind, count in counts.items()} == dict.fromkeys(counts, 0), name


def test_killed_at_random_it_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    counts = soak(tmp_path, "--kills", 6, "--seed", 3, "--only", "plain", "rolled back", "streamed")
    check(counts, 6)
    assert sum(count["while_publishing"] for count in counts.values()) >= 2, "saves are hit"


@pytest.mark.slow
def test_the_other_ways_to_train(tmp_path: Path) -> None:
    others = ("bf16, an adapter", "unfreezing", "from scratch to export", "two processes", "two processes, spread")
    counts = soak(tmp_path, "--kills", 10, "--seed", 4, "--only", *others)
    assert len(counts) == 5
    check(counts, 10)
