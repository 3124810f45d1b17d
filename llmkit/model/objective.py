"""What training needs of a task: batches, and the loss of one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

# Tensors, `lengths` (N,) of its N examples among them; numbers that stay on the CPU; and `places`, for each example where
# the tokens of it that are computed lie in the flattened `input_ids`.
Batch = dict[str, Any]


class Objective(Protocol):
    """What a model is trained on; it belongs to one model."""

    @property
    def padded(self) -> bool:
        """True when examples of unlike length cost padding, so that like ones should go together."""

    @property
    def why_padded(self) -> str | None:
        """What stands against doing without, where something does that is worth telling."""

    def computing(self, *, outline: bool = False) -> AbstractContextManager[None]:
        """To be entered around everything that computes with this objective's batches.

        With `outline`, a model on the meta device takes the memory of a GPU's attention, for a forecast.
        """

    def collate(self, examples: Sequence[dict[str, Any]]) -> Batch:
        """Examples as tensors on the CPU."""

    def count(self, batch: Batch) -> int:
        """How many things of a batch are supervised: the loss is divided by their number over the global batch."""

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The sum of the losses of all supervised things, a scalar in fp32; regularised while the model is training."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def sizes(batch: Batch) -> tuple[int, int]:
    """How many positions of a batch are tokens, and how many are computed, padding included."""
    return int(batch["lengths"].sum()), batch["input_ids"].numel()


def examples_in(batch: Batch) -> int:
    """How many examples a batch has."""
    return len(batch["lengths"])
