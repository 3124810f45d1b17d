"""One optimizer step: a global batch, in micro-batches, over all processes, with the right loss.

The loss is the sum over everything supervised in the global batch, divided by its number. How the batch is cut into
micro-batches and spread over processes changes nothing but speed; where memory runs out, it is cut finer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.errors import ResourceError
from llmkit.model.objective import Batch, Objective, examples_in, sizes, to_device
from llmkit.model.precision import autocast
from llmkit.train.divergence import Trouble
from llmkit.train.masters import Masters
from llmkit.train.mesh import Mesh
from llmkit.train.micro_batches import Feeder

_EVERYTHING = 2**62  # tokens at once


@dataclass(frozen=True)
class StepResult:
    """What a step did; `stop` and `save` are True when any process asked for it.

    `computed` counts positions: more than tokens with padding, fewer where examples share a beginning. `grad_norm` is
    None when gradients overflowed in fp16: the weights then stay and the scale of the loss is lowered.
    `micro_batch_tokens` is lower than before when memory ran out. Where there is `trouble`, the weights changed only if
    that is but to be warned of.
    """

    loss: float
    grad_norm: float | None
    tokens: int
    computed: int
    supervised: int
    stop: bool
    save: bool
    micro_batch_tokens: int | None
    trouble: Trouble | None = None


@dataclass
class Stepper:
    """Takes steps. `precision` is bf16, fp16 or fp32; `scaler` belongs to fp16."""

    accelerator: Any
    model: Any
    objective: Objective
    feeder: Feeder
    optimizer: torch.optim.Optimizer
    masters: Masters
    mesh: Mesh
    precision: str
    max_grad_norm: float | None
    warn: Callable[[str], None]
    judge: Callable[[float, float], Trouble | None]
    scaler: torch.amp.GradScaler | None = None
    apart: bool = False  # each process learns from its own share alone

    def step(
        self,
        step: int,
        rates: Sequence[float],
        micro_batch_tokens: int | None,
        *,
        stop: bool = False,
        save: bool = False,
    ) -> StepResult:
        """Learns from the 0-based global batch `step`; `rates` has one for each group of parameters.

        Weights and random state are as before when the step is in trouble that asks for more than a warning. Raises
        ResourceError when memory does not suffice for one example.
        """
        weigh = self.feeder.has_share(step)  # else a stand-in example, so that every process takes part
        random = _random_state(self.accelerator.device)
        while True:
            batches = self.feeder.take(step, micro_batch_tokens)
            counted = [sizes(batch) for batch in batches]
            own = [sum(map(self.objective.count, batches)), sum(t for t, _ in counted), sum(c for _, c in counted)]
            if not weigh or not self.mesh.speaks:
                own = [0, 0, 0]
            elif not self.mesh.counts:  # whose examples are those of another process, too
                own[1] = 0
            supervised, tokens, computed, stops, saves = self.sum_over_processes([*own, int(stop), int(save)])
            loss, fits = self._backward(batches, supervised, weigh=weigh)
            fits = self._least(fits)
            if fits == _EVERYTHING:
                break
            micro_batch_tokens = self._lowered(step, fits)
            _restore_random_state(random, self.accelerator.device)
        assert loss is not None, "a process that ran out of memory begins the step again"
        mean = self._sum_in_place(loss * self.mesh.speaks).item() / max(supervised, 1)
        divisor = max(own[0] if self.apart else supervised, 1)
        grad_norm, trouble = self.masters.stepping(lambda: self._update(mean, divisor, rates))
        if trouble is not None and trouble.action != "warn":
            _restore_random_state(random, self.accelerator.device)
        asked = stops > 0, saves > 0
        return StepResult(mean, grad_norm, tokens, computed, supervised, *asked, micro_batch_tokens, trouble)

    def _backward(self, batches: list[Batch], supervised: int, *, weigh: bool) -> tuple[torch.Tensor | None, int]:
        """Fills this process's gradients; gives the sum of its losses, and how many tokens may be computed at once.

        When memory ran out, the loss is None, and the tokens are half of those that were too many; 0 for one example.
        """
        device = self.accelerator.device
        total = torch.zeros((), device=device)
        self.masters.forget_gradients()
        rounds = self._in_step(batches)
        for number, (batch, counts) in enumerate(rounds, 1):
            try:
                with autocast(device, self.precision):
                    loss = self.masters.call(self.objective.loss, to_device(batch, device))
                weighed = loss * (weigh and counts)
                scaled = self.scaler.scale(weighed / max(supervised, 1)) if self.scaler else weighed
                self.masters.backward(scaled, last=number == len(rounds))
                total += weighed.detach()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.masters.sharded:  # the other processes wait for this one within their batches
                    raise ResourceError(
                        "there is not enough memory",
                        got=f"{sizes(batch)[0]:,} tokens at once",
                        hint="lower micro_batch_tokens: weights that are spread over processes cannot wait for one",
                    ) from None
                return None, sizes(batch)[0] // 2 if examples_in(batch) > 1 else 0
        self.masters.finish_gradients()
        return total, _EVERYTHING

    def _in_step(self, batches: list[Batch]) -> list[tuple[Batch, bool]]:
        """The batches, and whether they count: all processes compute as many where they need each other for each."""
        rounds = -self._least(-len(batches)) if self.masters.sharded else len(batches)
        return [(batch, True) for batch in batches] + [(batches[0], False)] * (rounds - len(batches))

    def _lowered(self, step: int, tokens: int) -> int:
        """Makes room and says so. Raises ResourceError when one example is too much."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not tokens:
            raise ResourceError(
                "there is not enough memory for one example",
                got=f"the longest of step {step + 1}",
                hint="lower data.max_length, set activation_checkpointing: true, or freeze more",
            )
        self.warn(
            f"out of memory in step {step + 1}: it is done again, and all that follow, with at most {tokens:,} tokens "
            "computed at once; the batch, the loss and the order stay the same"
        )
        return tokens

    def _update(self, loss: float, supervised: int, rates: Sequence[float]) -> tuple[float | None, Trouble | None]:
        """Judges, clips, and lets the optimizer work; gives the norm of the gradient, None when fp16 overflowed.

        Until now the gradients are those of the summed loss.
        """
        if self.accelerator.num_processes > 1 and not self.apart:
            self.masters.sum_gradients()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        divisor = supervised if self.scaler is None else 1  # fp16 has no room for the gradients of a sum
        grad_norm = self.masters.gradient_norm() / divisor
        overflowed = not math.isfinite(grad_norm) and self.scaler is not None and self.scaler.get_scale() > 1
        largest = self._largest(grad_norm) if self.apart else grad_norm
        trouble = self.judge(loss, 0.0 if overflowed else largest)
        if trouble is not None and trouble.action != "warn":
            return grad_norm, trouble
        excess = grad_norm / self.max_grad_norm if self.max_grad_norm is not None else 0.0
        self._divide_gradients(divisor * max(excess, 1.0))
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if not overflowed:
            self.masters.pull(self.optimizer.param_groups)
        return (None if overflowed else grad_norm), trouble

    def _divide_gradients(self, divisor: float) -> None:
        """Leaves it to the optimizer where that can do it on the way, as `torch.amp.GradScaler` asks it to."""
        if self.scaler is None and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            scale = torch.tensor(divisor, device=self.masters.gradients.device)
            self.optimizer.grad_scale = scale  # type: ignore[attr-defined]
        elif divisor != 1:
            self.masters.gradients.div_(divisor)

    def _sum_in_place(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def _largest(self, value: float) -> float:
        """In every process the largest of all; not a number where one has none."""
        values = torch.tensor([value, float(not math.isfinite(value))], device=self.accelerator.device)
        torch.distributed.all_reduce(values.nan_to_num_(0.0), torch.distributed.ReduceOp.MAX)
        return math.nan if values[1] else float(values[0])

    def _least(self, value: int) -> int:
        if self.accelerator.num_processes == 1:
            return value
        values = torch.tensor(value, device=self.accelerator.device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
        return int(values)

    def sum_over_processes(self, counts: list[int]) -> list[int]:
        """Each count summed over all processes, which must all call this."""
        if self.accelerator.num_processes == 1:
            return counts
        return self._sum_in_place(torch.tensor(counts, device=self.accelerator.device)).tolist()


def is_out_of_memory(error: BaseException) -> bool:
    """True when an allocation failed, on a GPU or on the CPU, which has no exception of its own for it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
