"""One optimizer step: a global batch, in micro-batches, over all processes, with the right loss.

The loss is the sum over everything supervised in the global batch, divided by its number. How the batch is cut into
micro-batches and spread over processes changes nothing but speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from llmkit.data.corpus import Corpus, Example
from llmkit.errors import DivergedError
from llmkit.model.precision import autocast

Batch = dict[str, torch.Tensor]


class Objective(Protocol):
    """What training needs of a task."""

    size_column: ClassVar[str]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples as padded tensors."""

    def count(self, batch: Batch) -> int:
        """How many things are supervised."""

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The sum of their losses."""


@dataclass(frozen=True)
class StepResult:
    """What a step did; `stop` is True when any process was asked to stop.

    `grad_norm` is None when gradients overflowed in fp16: the weights then stay and the scale of the loss is lowered.
    """

    loss: float
    grad_norm: float | None
    tokens: int
    supervised: int
    stop: bool


@dataclass
class Stepper:
    """Takes steps. `precision` is bf16, fp16 or fp32; `scaler` belongs to fp16."""

    accelerator: Any
    model: Any
    objective: Objective
    optimizer: torch.optim.Optimizer
    precision: str
    micro_batch_size: int | None
    max_grad_norm: float | None
    scaler: torch.amp.GradScaler | None = None

    def step(self, corpus: Corpus, numbers: Sequence[int], learning_rates: Sequence[float], stop: bool) -> StepResult:
        """Learns from the examples of one global batch; `learning_rates` has one for each group of parameters.

        Raises DivergedError when the loss or the gradient is not finite; the weights are then as before.
        """
        micro_batches = self._share_of_this_process(corpus, numbers)
        supervised = sum(self.objective.count(batch) for batch in micro_batches)
        tokens = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        if len(numbers) <= self.accelerator.process_index:
            supervised = tokens = 0  # a stand-in example, so that every process takes part; it weighs nothing
        supervised_in_all, tokens_in_all, stops = self.sum_over_processes([supervised, tokens, int(stop)])
        loss = self._backward(micro_batches, supervised_in_all, weigh=supervised > 0).item()
        grad_norm = self._clip().item()
        overflowed = not math.isfinite(grad_norm) and self.scaler is not None and self.scaler.get_scale() > 1
        if not (math.isfinite(loss) and (math.isfinite(grad_norm) or overflowed)):
            self.optimizer.zero_grad()
            raise DivergedError(
                "the loss or its gradient is not a finite number",
                got=f"loss {loss:.4g}, gradient norm {grad_norm:.4g}",
                hint="lower the learning rate, use precision: fp32, or look at the data of this step",
            )
        for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = rate
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        return StepResult(loss, None if overflowed else grad_norm, tokens_in_all, supervised_in_all, stops > 0)

    def _share_of_this_process(self, corpus: Corpus, numbers: Sequence[int]) -> list[Batch]:
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = list(numbers[rank::processes]) or list(numbers[:1])
        size = self.micro_batch_size or len(mine)
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        return [self.objective.collate([corpus[int(number)] for number in part]) for part in parts]

    def _backward(self, micro_batches: list[Batch], supervised: int, *, weigh: bool) -> torch.Tensor:
        """Fills the gradients; gives the mean loss over the global batch."""
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        # Gradients of several processes are averaged, but the loss is to be a sum over them.
        scale = self.accelerator.num_processes / max(supervised, 1) * weigh
        for number, batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                with autocast(device, self.precision):
                    loss = self.objective.loss(self.model, on_device)
                scaled = loss * scale
                (self.scaler.scale(scaled) if self.scaler else scaled).backward()
            total += loss.detach() * weigh
        return self.accelerator.reduce(total, "sum") / max(supervised, 1)

    def _clip(self) -> torch.Tensor:
        """The norm of all gradients, before they are scaled down to max_grad_norm."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return torch.nn.utils.clip_grad_norm_(trainable, limit)

    def sum_over_processes(self, counts: list[int]) -> list[int]:
        """Each count summed over all processes, which must all call this."""
        if self.accelerator.num_processes == 1:
            return counts
        summed = self.accelerator.reduce(torch.tensor(counts, device=self.accelerator.device), "sum")
        return [int(count) for count in summed]
