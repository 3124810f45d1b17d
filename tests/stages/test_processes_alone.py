"""What the processes of a training do each by itself: what a launcher says otherwise, signs of life, and what all find."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmkit.errors import ArtifactError
from llmkit.run.checkpoint import Checkpoints
from llmkit.stages.processes import Processes
from llmkit.train.hooks.heartbeat import HeartbeatHook
from llmkit.train.keeping import Keeper
from llmkit.train.state import TrainState


def test_other_ways_of_accelerate_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    run: Any = SimpleNamespace(reporter=SimpleNamespace(warn=warnings.append))
    recipe: Any = None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    Processes(recipe, run)
    assert warnings == ["DeepSpeed of `accelerate launch` is left out: `parallel` says how processes share a training"]
    Processes(recipe, run)
    assert len(warnings) == 1


def test_a_disk_without_room_for_a_sign_of_life_ends_nothing(tmp_path: Path) -> None:
    hook = HeartbeatHook(tmp_path / "gone" / ".beat-0")
    hook.after_step(TrainState(), {})
    hook.after_evaluation(TrainState(), {})
    hook.after_event(TrainState(), "spike", "why")
    hook.close()


def test_processes_that_find_different_checkpoints_do_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: Any = (SimpleNamespace(), tmp_path, Checkpoints(tmp_path, "f"), None, None, None, None, print)
    keeper = Keeper(*fields)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, 40])
    with pytest.raises(ArtifactError, match="do not find the same checkpoint") as error:
        keeper._require_same(None)
    assert error.value.got == "process 0: none, process 1: 40"
    found: Any = SimpleNamespace(step=40)
    keeper._require_same(found)
