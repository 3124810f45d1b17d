"""Training with gradients and optimizer state spread over the processes by DeepSpeed's ZeRO, stages 1 and 2.

Each process computes with all weights, and holds a slice of their fp32 masters, of the gradients (from stage 2 on, while
they are summed) and of the optimizer's state. DeepSpeed sums the gradients while the backward pass goes on, and brings
the new weights together. The step between is llmkit's own, which DeepSpeed takes for its client's optimizer: what is judged,
clipped, averaged and saved is the same as in any other training, and other ways to share go on from its checkpoints. With
`offload` the slices and the step are the CPU's. Stage 3 is what `train.sharding` does.
Rajbhandari et al., 2020: https://arxiv.org/abs/1910.02054; Ren et al., 2021: https://arxiv.org/abs/2101.06840
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmkit.errors import RecipeError, ResourceError
from llmkit.model.objective import Objective
from llmkit.model.precision import compute_in, kept_in_fp32
from llmkit.model.sending import send_from_first
from llmkit.train.masters import Updated, loses_bits
from llmkit.train.mesh import Mesh
from llmkit.train.spread import Computation, SpreadMasters

_MOST_IN_BUCKET = 50_000_000  # numbers; DeepSpeed's own are ten times as many, whatever the size of a model
_FAILURES = (ImportError, OSError, RuntimeError, ValueError, AssertionError)  # of DeepSpeed that does not come up


@dataclass(frozen=True)
class Zero(Mesh):
    """A process of a training whose gradients and optimizer state DeepSpeed spreads."""

    stage: int = 2  # 1: gradients are whole until a step's last micro-batch
    offload: bool = False


class ZeroMasters(SpreadMasters):
    """The slices of a model's parameters that belong to this process; every process must call its methods.

    `model` is whole in the first process, and may be on the meta device in the others; it comes to `device`, as it is in
    the first one; its trainable parameters are all to be computed with in the same precision. Raises RecipeError when
    DeepSpeed is not installed, and ResourceError when it cannot be started.
    """

    mesh: Zero

    def __init__(self, model: Any, precision: str, zero: Zero, device: torch.device) -> None:
        self.mesh, self.model = zero, model
        send_from_first(model, device)
        self._own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        uncast = [*model.buffers(), *(model.get_parameter(name) for name in kept_in_fp32(model) - self._own.keys())]
        as_they_are = [(tensor, tensor.detach().clone()) for tensor in uncast]
        originals = compute_in(model, precision)
        self.copied, self._cast = list(self._own), frozenset(originals)
        self.frozen = {n: t.cpu() for n, t in originals.items() if n not in self._own and loses_bits(t)}
        self._step = _Step(list(self._own.values()))
        self._engine = _engine(model, self._step, precision, zero)
        for tensor, value in as_they_are:  # which some versions of DeepSpeed cast to bf16: rotary frequencies, say
            tensor.data = value
        [self._flat] = self._step.param_groups[0]["params"]
        self._slices = {name: _Slice.of(p) for name, p in self._own.items()}
        self.weights = {name: nn.Parameter(part.of_flat(self._flat)) for name, part in self._slices.items()}
        self.gradients = torch.zeros(sum(w.numel() for w in self.weights.values()), device=self._flat.device)
        self._anchors, self._strength, self._held = {}, 0.0, {}
        start = 0
        for name, weight in self.weights.items():
            weight.grad = self.gradients[start : start + weight.numel()]
            start += weight.numel()
            if name in originals:
                weight.data.copy_(self._part(name, originals[name]))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of the model and other arguments; losses that are to be learnt from belong to DeepSpeed."""
        return (self._engine if torch.is_grad_enabled() else self._engine.module)(function, *arguments)

    def computing(self, objective: Objective) -> AbstractContextManager[None]:
        """To be entered around everything that computes with the model."""
        return objective.computing()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """The backward pass of a micro-batch, the last one of a step or not."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def forget_gradients(self) -> None:
        """Begins a step anew.

        DeepSpeed has let go of those of the step before, but for what it offloads: there what gets no gradient in this step
        would have that of another one, and a step that was not finite would spoil all that come after it.
        """
        if self.mesh.offload:
            self._flat.grad.zero_()
            self._engine.optimizer.averaged_gradients.clear()
            for summed in self._engine.optimizer.accumulated_grads_in_cpu.values():
                summed.zero_()

    def finish_gradients(self) -> None:
        """Nothing: they are taken in within the step."""

    def stepping(self, update: Callable[[], Updated]) -> Updated:
        """What `update` gives, within DeepSpeed's step, which takes no gradients to it that are not finite."""
        found: list[Updated] = []

        def work() -> None:
            for name, part in self._slices.items():
                torch.mul(part.of_flat(self._flat.grad), self.mesh.count, out=self.weights[name].grad)
            found.append(update())

        self._step.work = work
        self._engine.step()
        if not found:
            self.gradients.fill_(math.nan)
            found.append(update())
            self.publish()
        return found[0]

    @torch.no_grad()
    def publish(self) -> None:
        """Gives the model, in all processes, what was changed outside a step."""
        self._engine.optimizer.update_lp_params()

    def release(self) -> None:
        """Lets go of the gradients and of DeepSpeed; no step can be taken any more."""
        super().release()
        self._engine.destroy()
        del self._engine

    @contextmanager
    def in_full(self) -> Iterator[Any]:
        """The model in full precision, on the CPU of the first process, to be saved; training is over then."""
        full = self._full_weights() | self.frozen
        if self.mesh.number == 0:
            for name, parameter in self.model.named_parameters():
                value = full.get(name, parameter.data)
                parameter.data = (value.float() if name in self._cast else value).cpu()
        yield self.model

    def _gathered(self, name: str, part: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(self._own[name].shape, device=self._device)
        self._part(name, whole).copy_(part)
        torch.distributed.all_reduce(whole.view(torch.int32))  # of bits: -0.0 + 0.0 would be 0.0
        return whole

    def _part(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        return self._slices[name].of_parameter(whole)


@dataclass(frozen=True)
class _Slice:
    """The numbers of a parameter that belong to this process: `count`, from `start` of it, from `place` of all that do."""

    start: int = 0
    place: int = 0
    count: int = 0

    @classmethod
    def of(cls, parameter: Any) -> _Slice:
        found = parameter._hp_mapping
        if found is None:
            return cls()
        own = found.lp_fragment_address
        return cls(own.start, found.get_hp_fragment_address().start, own.numel)

    def of_parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1)[self.start : self.start + self.count]

    def of_flat(self, flat: Any) -> torch.Tensor:
        found: torch.Tensor = flat.detach()[self.place : self.place + self.count]
        return found


class _Step(torch.optim.Optimizer):
    """What DeepSpeed calls once gradients are summed: it changes the one slice that it is given, as `work` says."""

    def __init__(self, parameters: list[Any]) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self.work: Callable[[], None] = lambda: None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.work()


def bucket_numbers(trained: int) -> int:
    """How many gradients DeepSpeed sums at once, of so many."""
    return max(1, min(trained, _MOST_IN_BUCKET))


def require_deepspeed() -> Any:
    """DeepSpeed, without the lines that it prints. Raises RecipeError when it is not installed."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with redirect_stdout(io.StringIO()):
            import deepspeed
    except _FAILURES as error:
        raise RecipeError(
            "parallel: deepspeed needs DeepSpeed",
            got=str(error),
            hint="pip install 'llmkit[deepspeed]'",
            where="parallel",
        ) from None
    finally:
        logging.disable(before)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def _engine(model: nn.Module, step: torch.optim.Optimizer, precision: str, zero: Zero) -> Any:
    """DeepSpeed, ready for the first backward pass. Raises ResourceError."""
    deepspeed, trained = require_deepspeed(), sum(p.numel() for p in model.parameters() if p.requires_grad)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # it counts batches, and cannot know of how many examples
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": zero.stage, "reduce_bucket_size": bucket_numbers(trained)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,  # the step clips; left out, DeepSpeed would, to 1
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if precision == "bf16":
        settings["bf16"] = {"enabled": True}
    if zero.offload:
        on_gpu = torch.cuda.is_available()
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    try:
        with redirect_stdout(io.StringIO()):
            engine, *_ = deepspeed.initialize(model=Computation(model), optimizer=step, config=settings)
    except _FAILURES as error:
        raise ResourceError(
            "DeepSpeed could not be started", got=str(error), hint="set parallel: fsdp", where="parallel"
        ) from error
    return engine
