"""What watches a training. A hook changes nothing about what is learnt."""

from __future__ import annotations

from typing import Any, Protocol

from llmkit.train.state import TrainState


class Hook(Protocol):
    """Is told of each step and each evaluation."""

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """`values`: loss, lr, grad_norm, tokens_per_second of the step just taken."""

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """`values`: eval_loss."""

    def close(self) -> None:
        """Training has ended, whatever way."""
