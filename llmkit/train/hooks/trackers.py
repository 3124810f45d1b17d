"""Sends what is logged to Accelerate's trackers: TensorBoard and the rest."""

from __future__ import annotations

from typing import Any

from llmkit.train.state import TrainState


class TrackersHook:
    """Logs every `log_every`-th step and every evaluation through an Accelerator whose trackers are started."""

    def __init__(self, accelerator: Any, log_every: int) -> None:
        self.accelerator = accelerator
        self.log_every = log_every

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs under `train/`."""
        if state.step == 1 or state.step % self.log_every == 0:
            self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=state.step)

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs under `held-out/`."""
        self.accelerator.log({f"held-out/{name}": value for name, value in values.items()}, step=state.step)

    def close(self) -> None:
        """Finishes each tracker; not `end_training`, which would also end the process group that a later stage needs."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
