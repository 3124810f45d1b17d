"""Weights, gradients and optimizer state of which each process has a part: what is saved of them, and how it comes together.

In a checkpoint each process writes its rows of every tensor, whatever part of it it computes with, so that any number of
processes goes on from it, and in any way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from llmkit.run.checkpoint import Writers
from llmkit.train.masters import Masters, square_of
from llmkit.train.mesh import Mesh

ELEMENTWISE = frozenset({"adamw", "sgd", "lion", "rmsprop", "adagrad"})  # optimizers that treat each number by itself


class Computation(nn.Module):
    """Computes anything with a model; the root of what is spread, as hooks of modules want one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


class SpreadMasters(Masters, ABC):
    """The parts of a model's parameters that belong to this process; every process must call its methods."""

    sharded = True
    mesh: Mesh

    def mesh_among(self, accelerator: Any) -> Mesh:
        """Where this process stands among those that train together."""
        return self.mesh

    def sum_gradients(self) -> None:
        """Nothing is left to be summed."""

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients of all processes."""
        square = square_of(self._counted()).to(self._device)
        torch.distributed.all_reduce(square)
        return float(square.sqrt())

    def outlines(self) -> dict[str, torch.Tensor]:
        """What `whole` gives, on the meta device."""
        shapes = {
            name: torch.empty(p.shape, dtype=self.weights[name].dtype, device="meta") for name, p in self._own.items()
        }
        return shapes | {name: buffer.to("meta") for name, buffer in self._saved_buffers().items()}

    def whole(self) -> dict[str, torch.Tensor]:
        """What training changes, on the CPU of the first process; nothing in the others."""
        buffers = {} if self.mesh.number else self._saved_buffers()
        return self._full_weights() | {name: buffer.detach().cpu() for name, buffer in buffers.items()}

    def saved(self) -> dict[str, torch.Tensor]:
        """The rows of what training changes, on the CPU; what is everywhere the same, in the first process."""
        return self.parts({name: (name, tensor) for name, tensor in self._saved().items()})

    def parts(self, rows: dict[str, tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What this process saves of tensors that belong to parameters: its rows, and what is no rows in the first one."""
        found = {}
        for key, (name, tensor) in rows.items():
            if name in self.weights and tensor.shape == self.weights[name].shape:
                found[key] = self._rows_over_all(name, tensor.detach()).cpu().contiguous()
            elif self.mesh.number == 0:
                found[key] = tensor.detach().cpu().contiguous()
        return found

    def writers(self, silence: timedelta) -> Writers:
        """All processes; they speak in a group of their own, as checkpoints are written while training goes on."""
        group = torch.distributed.new_group(backend="gloo", timeout=silence)

        def exchange(own: Any) -> list[Any]:
            found: list[Any] = [None] * self.mesh.count
            torch.distributed.all_gather_object(found, own, group=group)
            return found

        return Writers(self.mesh.number, self.mesh.count, exchange)

    def rows(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of something that is shaped as a parameter, by itself."""
        if name not in self._own or whole.shape != self._own[name].shape:
            return whole
        return self._part(name, whole).clone()

    @property
    def _device(self) -> torch.device:
        """Where processes exchange what they have."""
        device: torch.device = self.model.device
        return device

    def _counted(self) -> torch.Tensor:
        """Of this process's gradients those that no other one has too."""
        return self.gradients

    def _full_weights(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, weight in self.weights.items():
            full = self._gathered(name, weight.detach())
            if self.mesh.number == 0:
                found[name] = full.cpu()
            del full
        return found

    def _rows_over_all(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """What is shaped as a parameter, cut into rows over all processes, whatever of it this process computes with."""
        rows = chunk_of(self._gathered(name, part), self.mesh.count, self.mesh.number)
        return rows.clone()  # so that the rest of it goes

    @abstractmethod
    def _gathered(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The whole of what is shaped as a parameter, of which this process has a part."""

    @abstractmethod
    def _part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This process's part of that."""


def chunk_of(tensor: torch.Tensor, parts: int, number: int) -> torch.Tensor:
    """Part `number` of a tensor's rows; the last ones may have fewer, or none."""
    found = tensor.chunk(parts)
    return found[number] if number < len(found) else tensor[:0]
