"""Writes the steps that are to be logged, and every evaluation, to metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmkit.run.log import MetricsLog
from llmkit.train.memory import peak_memory_bytes
from llmkit.train.state import TrainState


class MetricsLogHook:
    """Appends to a MetricsLog."""

    def __init__(self, log: MetricsLog, is_logged: Callable[[int], bool]) -> None:
        self.log = log
        self.is_logged = is_logged

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs a step that is to be."""
        if self.is_logged(state.step):
            own = {"seconds": round(state.seconds, 3), "peak_memory_bytes": peak_memory_bytes()}
            self.log.write(state.step, {"tokens": state.tokens} | values | own)

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs every evaluation."""
        self.log.write(state.step, {"tokens": state.tokens} | values)

    def after_event(self, state: TrainState, event: str, why: str) -> None:
        """Logs every event, that of a refused step with its number; what was rolled back is forgotten."""
        if event == "rolled back":
            self.log.forget_after(state.step, state.refused_steps)
        if event in ("rolled back", "skipped"):
            self.log.write(state.step, {"event": event, "why": why, "refused": state.refused_steps})
        else:
            self.log.write(state.step + 1, {"event": event, "why": why})

    def before_save(self) -> None:
        """What was logged until a checkpoint is on the disk before it is."""
        self.log.sync()

    def close(self) -> None:
        """Nothing is open."""
