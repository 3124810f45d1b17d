"""Shows the loss, the speed and the time left."""

from __future__ import annotations

from typing import Any

from llmkit.run.reporter import Progress
from llmkit.train.state import TrainState


class ProgressHook:
    """Advances a Progress, which stands at `step`, by one a step."""

    def __init__(self, progress: Progress, step: int) -> None:
        self.progress = progress
        self._held_out = ""
        self._step = step

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """Shows the step's loss and speed."""
        fields = {"loss": f"{values['loss']:.4f}", "speed": f"{values['tokens_per_second']:,.0f} tok/s"}
        self.progress.advance(state.step - self._step, **fields, held_out=self._held_out)
        self._step = state.step

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """Remembers the held-out loss, to show it from now on."""
        self._held_out = f"held-out {values['eval_loss']:.4f}"

    def after_event(self, state: TrainState, event: str, why: str) -> None:
        """Goes on, or back, to where the training stands."""
        self.progress.advance(state.step - self._step)
        self._step = state.step

    def before_save(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Ends the progress."""
        self.progress.close()
