"""Leaves a sign of life with every step, by which a launcher sees that a process hangs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from llmkit.train.state import TrainState


class HeartbeatHook:
    """Writes the step into a file, which is gone when training has ended."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """Writes the step."""
        with suppress(OSError):  # a full disk is no reason to stop
            self.file.write_text(str(state.step))

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """Is a sign of life too."""
        self._touch()

    def after_event(self, state: TrainState, event: str, why: str) -> None:
        """Is a sign of life too."""
        self._touch()

    def before_save(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Takes the file away."""
        self.file.unlink(missing_ok=True)

    def _touch(self) -> None:
        with suppress(OSError):
            self.file.touch()
