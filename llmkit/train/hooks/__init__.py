"""What watches a training. A hook changes nothing about what is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llmkit.train.state import TrainState


class Hook(Protocol):
    """Is told of each step and each evaluation."""

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """`values`: loss, lr, grad_norm, tokens_per_second of the step just taken."""

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """`values`: eval_loss."""

    def after_event(self, state: TrainState, event: str, why: str) -> None:
        """A step was out of the ordinary: `skipped`, `rolled back` (the state is that before), or a `spike`."""

    def before_save(self) -> None:
        """A checkpoint is about to be written, in the process that writes it. Raises OSError when it must not be."""

    def close(self) -> None:
        """Training has ended, whatever way."""


def tell(hooks: Sequence[Hook], state: TrainState, event: str, why: str) -> None:
    """Tells all of an event."""
    for hook in hooks:
        hook.after_event(state, event, why)
