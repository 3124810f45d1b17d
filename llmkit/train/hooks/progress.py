"""Shows the loss, the speed and the time left."""

from __future__ import annotations

from typing import Any

from llmkit.run.reporter import Progress
from llmkit.train.state import TrainState


class ProgressHook:
    """Advances a Progress by one a step."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._held_out = ""

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """Shows the step's loss and speed."""
        fields = {"loss": f"{values['loss']:.4f}", "speed": f"{values['tokens_per_second']:,.0f} tok/s"}
        self.progress.advance(1, **fields, held_out=self._held_out)

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """Remembers the held-out loss, to show it from now on."""
        self._held_out = f"held-out {values['eval_loss']:.4f}"

    def close(self) -> None:
        """Ends the progress."""
        self.progress.close()
