"""Writes every `log_every`-th step and every evaluation to metrics.jsonl."""

from __future__ import annotations

from typing import Any

from llmkit.run.log import MetricsLog
from llmkit.train.memory import peak_memory_bytes
from llmkit.train.state import TrainState


class MetricsLogHook:
    """Appends to a MetricsLog."""

    def __init__(self, log: MetricsLog, log_every: int) -> None:
        self.log = log
        self.log_every = log_every

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs the first step and every `log_every`-th."""
        if state.step == 1 or state.step % self.log_every == 0:
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
