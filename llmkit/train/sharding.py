"""Training with weights, gradients and optimizer state spread over the processes, by PyTorch's `fully_shard` (FSDP2).

Each process holds its rows of every parameter in fp32 and what the optimizer knows of them; a block's rows come together,
in the precision to compute in, while it computes. Whatever an optimizer does to each number by itself it can do to rows.
Each writes its rows of a checkpoint, from which a training goes on in any number of processes, also without sharding.
Zhao et al., 2023: https://arxiv.org/abs/2304.11277

Where processes share their products too, the weights of a block's products are first cut over those that learn from the
same examples, and a block's rows are spread over the others. What is in no block is spread over all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from llmkit.model.anatomy import blocks_of
from llmkit.model.context import Context
from llmkit.model.objective import Objective
from llmkit.model.precision import default_device
from llmkit.model.sending import send_from_first
from llmkit.model.tensor_parallel import TensorPlan, cut_products, parameters_in, tensor_plan
from llmkit.train.mesh import Mesh
from llmkit.train.spread import Computation, SpreadMasters, chunk_of


class ShardedMasters(SpreadMasters):
    """The rows of a model's parameters that belong to this process; every process must call its methods.

    `model` is whole in the first process, and may be on the meta device in the others; block by block it comes to `device`,
    where it is to be trained. Without a device it stays where it is, whole or on the meta device in all, to see what each
    would hold. It can be computed with by `call` alone. A mesh whose `tensor` is above 1 asks for a model with a tensor plan.
    """

    def __init__(self, model: Any, precision: str, mesh: Mesh, device: torch.device | None = None) -> None:
        self.mesh = mesh
        plan = tensor_plan(model, self.mesh.tensor) if self.mesh.tensor > 1 else TensorPlan()
        assert plan.why_not is None, "who asks for a mesh has asked whether the model goes with it"
        self._cut = plan.dimensions(model)
        self._in_blocks = parameters_in(model, blocks_of(model)) if self.mesh.tensor > 1 else frozenset()
        self._alone = sorted(parameters_in(model, map(model.get_submodule, plan.alone)))
        self.model, self._computation = model, Computation(model)
        self._everybody, self._grid = _spread(self._computation, plan, precision, mesh, device)
        self._all: dict[str, Any] = dict(model.named_parameters())
        self._own = {name: p for name, p in self._all.items() if p.requires_grad}
        self.weights = {name: nn.Parameter(p.to_local().detach()) for name, p in self._own.items()}
        self.copied, self.frozen, self._cast = [], {}, frozenset()
        self._anchors, self._strength, self._held = {}, 0.0, {}
        self.gradients = torch.zeros(sum(w.numel() for w in self.weights.values()), device=model.device)
        self._repeated = self._in_blocks - self._cut.keys()  # whole in all that learn from the same examples
        start = 0
        for _, weight in sorted(self.weights.items(), key=lambda item: item[0] in self._repeated):
            weight.grad = self.gradients[start : start + weight.numel()].view(weight.shape)
            start += weight.numel()
        self._once = start - sum(self.weights[name].numel() for name in self._repeated & self.weights.keys())

    def context(self) -> Context:
        """Those that share the tokens of examples with this process; every process must call it."""
        from torch.distributed.device_mesh import init_device_mesh

        shape = (self.mesh.shares, self.mesh.context, self.mesh.tensor)
        grid = init_device_mesh(self.gradients.device.type, shape, mesh_dim_names=("data", "context", "tensor"))
        return Context(self.mesh.piece, self.mesh.context, grid.get_group("context"))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of the model and other arguments, its parameters whole meanwhile."""
        return self._computation(function, *arguments)

    def over_pieces(self, sums: torch.Tensor) -> torch.Tensor:
        """What was summed over the same examples in all processes, each of which computes a piece of them."""
        torch.distributed.all_reduce(sums)
        return sums / (self.mesh.count // self.mesh.context)

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
        for name in self._alone:
            if name in self.weights:
                torch.distributed.all_reduce(self.weights[name].grad, group=self._grid.get_group("tensor"))

    def _counted(self) -> torch.Tensor:
        return self.gradients if self.mesh.speaks else self.gradients[: self._once]

    def release(self) -> None:
        """Lets go of the gradients; no step can be taken any more."""
        self.forget_gradients()
        super().release()

    def _rows_over_all(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """What is shaped as a parameter, cut into rows over all processes, whatever of it this process computes with."""
        if self._grid is None or name not in self._in_blocks:
            return part
        return super()._rows_over_all(name, part)

    def _gathered(self, name: str, part: torch.Tensor) -> torch.Tensor:
        """The whole of what is shaped as a parameter, of which this process has a part."""
        from torch.distributed.tensor import Shard

        shape = list(self._all[name].shape)
        if self._grid is None or name not in self._in_blocks:
            return _together(part, self._everybody, Shard(0), shape)
        cut = self._cut.get(name)
        own = [size // (self.mesh.tensor if dimension == cut else 1) for dimension, size in enumerate(shape)]
        part = _together(part, self._grid["data"], Shard(0), own)
        return part if cut is None else _together(part, self._grid["tensor"], Shard(cut), shape)

    def _part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        if name not in self._in_blocks:
            return chunk_of(whole, self.mesh.count, self.mesh.number)
        part = whole.chunk(self.mesh.tensor, self._cut[name])[self.mesh.part] if name in self._cut else whole
        return chunk_of(part, self.mesh.others, self.mesh.place)

    @torch.no_grad()
    def publish(self) -> None:
        """Lets go of weights that are not those that the optimizer has changed."""
        self._computation.reshard()  # type: ignore[operator]

    @contextmanager
    def in_full(self) -> Iterator[Any]:
        """The model with all its weights, on the CPU of the first process, to be saved; training is over then."""
        whole: dict[int, nn.Parameter] = {}
        for name, parameter in self._all.items():
            full = self._gathered(name, parameter.to_local().detach())
            if self.mesh.number == 0:
                whole[id(parameter)] = nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad)
            del full
        if self.mesh.number == 0:
            for module in self.model.modules():
                for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                    setattr(module, leaf, whole[id(parameter)])
        yield self.model


def _spread(
    computation: Computation, plan: TensorPlan, precision: str, mesh: Mesh, device: torch.device | None
) -> tuple[Any, Any]:
    """Leaves each process its part of the parameters; gives the device mesh of all, and that of `data` and `tensor`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    model: Any = computation.model
    grid = None
    kind = (device or (default_device() if model.device.type == "meta" else model.device)).type
    everybody = others = init_device_mesh(kind, (mesh.count,))
    if mesh.tensor > 1:
        grid = init_device_mesh(kind, (mesh.others, mesh.tensor), mesh_dim_names=("data", "tensor"))
        others = grid["data"]
    computes_in = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(computes_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks_of(model), computation):
        if device is not None:
            send_from_first(module, device)
        if grid is not None and module is not computation:
            cut_products(module, model, plan, grid["tensor"])
        fully_shard(module, mesh=everybody if module is computation else others, mp_policy=policy)
    spread: list[Any] = [module for module in computation.modules() if isinstance(module, FSDPModule)]
    for module in spread:
        # The sum over all processes, which is divided once; those that learn from the same examples have the same.
        module.set_gradient_divide_factor(float(mesh.tensor) if module is computation else 1.0)
        module.set_force_sum_reduction_for_comms(True)
    return everybody, grid


def _together(part: torch.Tensor, mesh: Any, placement: Any, shape: list[int]) -> torch.Tensor:
    """The whole of a tensor that is cut over a one-dimensional device mesh."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    cut = DTensor.from_local(part, mesh, [placement], run_check=False, shape=torch.Size(shape), stride=stride)
    return cut.full_tensor()


@contextmanager
def _resharded(computation: Any, computing: AbstractContextManager[None]) -> Iterator[None]:
    """After it, no parameter is left whole: one that changes meanwhile would not be noticed."""
    try:
        with computing:
            yield
    finally:
        computation.reshard()
