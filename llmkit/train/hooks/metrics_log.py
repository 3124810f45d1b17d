"""Writes every `log_every`-th step and every evaluation to metrics.jsonl."""

from __future__ import annotations

from typing import Any

from llmkit.run.log import MetricsLog
from llmkit.train.state import TrainState


class MetricsLogHook:
    """Appends to a MetricsLog."""

    def __init__(self, log: MetricsLog, log_every: int) -> None:
        self.log = log
        self.log_every = log_every

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs the first step and every `log_every`-th."""
        if state.step == 1 or state.step % self.log_every == 0:
            self.log.write(state.step, {"tokens": state.tokens} | values)

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs every evaluation."""
        self.log.write(state.step, {"tokens": state.tokens} | values)

    def close(self) -> None:
        """Nothing is open."""
