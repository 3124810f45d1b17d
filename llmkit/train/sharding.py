"""Training with weights, gradients and optimizer state spread over the processes, by PyTorch's `fully_shard` (FSDP2).

Each process holds its rows of every parameter in fp32 and what the optimizer knows of them; a block's rows come together,
in the precision to compute in, while it computes. Whatever an optimizer does to each number by itself it can do to rows.
Each writes its rows of a checkpoint, from which a training goes on in any number of processes, also without sharding.
Zhao et al., 2023: https://arxiv.org/abs/2304.11277
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from llmkit.model.anatomy import blocks_of
from llmkit.model.objective import Objective
from llmkit.model.precision import default_device
from llmkit.run.checkpoint import Writers
from llmkit.train.masters import Masters

ELEMENTWISE = frozenset({"adamw", "sgd", "lion", "rmsprop", "adagrad"})  # optimizers that treat each number by itself


class _Computation(nn.Module):
    """Computes anything with a model, whose parameters are whole meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model, *arguments)


class ShardedMasters(Masters):
    """The rows of a model's parameters that belong to this process; every process must call its methods.

    `model` is whole, and on the device where it is to be trained, or on the meta device, to see what each process would
    hold. It can be computed with by `call` alone.
    """

    sharded = True

    def __init__(self, model: Any, precision: str) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        self._processes, self._process = torch.distributed.get_world_size(), torch.distributed.get_rank()
        device = default_device() if model.device.type == "meta" else model.device
        self._mesh = init_device_mesh(device.type, (self._processes,))
        computes_in = torch.bfloat16 if precision == "bf16" else None
        policy = MixedPrecisionPolicy(computes_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
        self.model, self._computation = model, _Computation(model)
        for block in blocks_of(model):
            fully_shard(block, mesh=self._mesh, mp_policy=policy)
        fully_shard(self._computation, mesh=self._mesh, mp_policy=policy)
        for module in self._computation.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the sum over all processes, which is divided once
                module.set_force_sum_reduction_for_comms(True)
        self._all: dict[str, Any] = dict(model.named_parameters())
        self._own = {name: p for name, p in self._all.items() if p.requires_grad}
        self.weights = {name: nn.Parameter(p.to_local().detach()) for name, p in self._own.items()}
        self.copied, self.frozen, self._cast = [], {}, frozenset()
        self._anchors, self._strength, self._held = {}, 0.0, {}
        self.gradients = torch.zeros(sum(w.numel() for w in self.weights.values()), device=model.device)
        start = 0
        for weight in self.weights.values():
            weight.grad = self.gradients[start : start + weight.numel()].view(weight.shape)
            start += weight.numel()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of the model and other arguments, its parameters whole meanwhile."""
        return self._computation(function, *arguments)

    def computing(self, objective: Objective) -> AbstractContextManager[None]:
        """To be entered around everything that computes with the model."""
        return _resharded(self._computation, objective.computing())

    def forget_gradients(self) -> None:
        """Begins a step anew."""
        for parameter in self._own.values():
            parameter.grad = None

    def finish_gradients(self) -> None:
        """Takes in this process's rows of the gradients, which are sums over all processes."""
        for name, parameter in self._own.items():
            target = self.weights[name].grad
            assert target is not None, "masters keep their gradients"
            if parameter.grad is None:
                target.zero_()
            else:
                target.copy_(parameter.grad.to_local())
            parameter.grad = None

    def sum_gradients(self) -> None:
        """Nothing is left to be summed."""

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients of all processes."""
        square = torch.tensor(super().gradient_norm() ** 2, dtype=torch.float64, device=self.gradients.device)
        torch.distributed.all_reduce(square)
        return float(square.sqrt())

    def release(self) -> None:
        """Lets go of the gradients; no step can be taken any more."""
        self.forget_gradients()
        super().release()

    def outlines(self) -> dict[str, torch.Tensor]:
        """What `whole` gives, on the meta device."""
        shapes = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in self._own.items()}
        return shapes | {name: buffer.to("meta") for name, buffer in self._saved_buffers().items()}

    def whole(self) -> dict[str, torch.Tensor]:
        """What training changes, on the CPU of the first process; nothing in the others."""
        found = {}
        for name, parameter in self._own.items():
            full = parameter.full_tensor().detach()
            if self._process == 0:
                found[name] = full.cpu()
            del full
        return found | ({} if self._process else {name: t.detach().cpu() for name, t in self._saved_buffers().items()})

    def saved(self) -> dict[str, torch.Tensor]:
        """The rows of what training changes, on the CPU; what is everywhere the same, in the first process."""
        return self.parts({name: (name, tensor) for name, tensor in self._saved().items()})

    def parts(self, rows: dict[str, tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What this process saves of tensors that belong to parameters: its rows, and what is no rows in the first one."""
        return {
            key: tensor.detach().cpu().contiguous()
            for key, (name, tensor) in rows.items()
            if self._process == 0 or (name in self.weights and tensor.shape == self.weights[name].shape)
        }

    def writers(self, silence: timedelta) -> Writers:
        """All processes; they speak in a group of their own, as checkpoints are written while training goes on."""
        group = torch.distributed.new_group(backend="gloo", timeout=silence)

        def exchange(own: Any) -> list[Any]:
            found: list[Any] = [None] * self._processes
            torch.distributed.all_gather_object(found, own, group=group)
            return found

        return Writers(self._process, self._processes, exchange)

    def rows(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """This process's rows of something that is shaped as a parameter, by themselves."""
        if name not in self._own or whole.shape != self._own[name].shape:
            return whole
        parts = whole.chunk(self._processes)
        return (parts[self._process] if self._process < len(parts) else whole[:0]).clone()

    @torch.no_grad()
    def publish(self) -> None:
        """Lets go of weights that are not those that the optimizer has changed."""
        self._computation.reshard()  # type: ignore[operator]

    @contextmanager
    def in_full(self) -> Iterator[Any]:
        """The model with all its weights, on the CPU of the first process, to be saved; training is over then."""
        whole: dict[int, nn.Parameter] = {}
        for parameter in self._all.values():
            full = parameter.full_tensor()
            if self._process == 0:
                whole[id(parameter)] = nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad)
            del full
        if self._process == 0:
            for module in self.model.modules():
                for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                    setattr(module, leaf, whole[id(parameter)])
        yield self.model


@contextmanager
def _resharded(computation: Any, computing: AbstractContextManager[None]) -> Iterator[None]:
    """After it, no parameter is left whole: one that changes meanwhile would not be noticed."""
    try:
        with computing:
            yield
    finally:
        computation.reshard()
