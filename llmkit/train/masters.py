"""What an optimizer changes: fp32 weights and their gradients, whatever numbers the model computes with.

In bf16 the model holds bf16 copies of all parameters: products need no casts, and activations take half the memory. The
optimizer works on fp32 masters, to which each micro-batch's gradients are added as soon as they are there (Micikevicius
et al., 2017: https://arxiv.org/abs/1710.03740). Otherwise the masters are the model's own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from llmkit.model.objective import Objective
from llmkit.model.precision import compute_in
from llmkit.run.checkpoint import Writers
from llmkit.train.mesh import Mesh

Updated = TypeVar("Updated")
_CACHED = 2**18  # numbers: a megabyte in fp32, which stays in a processor's cache
_SUMMED = 2**22  # numbers whose squares one fp32 sum adds up well; few enough sums for a GPU


class Masters:
    """The trainable weights of a model by name, in fp32; each one's `grad` is a view of `gradients`, one flat tensor."""

    sharded = False

    def __init__(self, model: Any, precision: str) -> None:
        self.model = model
        self._own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        originals = compute_in(model, precision)
        self._cast = frozenset(originals)
        self.frozen = {  # not on a GPU, where nothing needs them before they are saved
            name: tensor.cpu() if tensor.is_cuda else tensor
            for name, tensor in originals.items()
            if name not in self._own and loses_bits(tensor)
        }
        self.weights = {
            name: torch.nn.Parameter(originals[name]) if name in originals else p for name, p in self._own.items()
        }
        self.copied = [name for name in self._own if name in originals]
        self._touched: set[str] = set()
        self._anchors: dict[str, torch.Tensor] = {}  # where weights come from
        self._strength = 0.0
        self._held: dict[str, torch.Tensor] = {}  # the gradients of what does not move yet
        self.gradients = torch.zeros(sum(p.numel() for p in self._own.values()), device=model.device)
        start = 0
        for name, weight in self.weights.items():
            weight.grad = self.gradients[start : start + weight.numel()].view(weight.shape)
            start += weight.numel()
            if name in originals:
                self._own[name].register_post_accumulate_grad_hook(self._collector(name))

    def mesh_among(self, accelerator: Any) -> Mesh:
        """Where this process stands among those that train together."""
        return Mesh(accelerator.process_index, accelerator.num_processes)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function makes of the model and other arguments."""
        return function(self.model, *arguments)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """The backward pass of a micro-batch, the last one of a step or not."""
        loss.backward()

    def stepping(self, update: Callable[[], Updated]) -> Updated:
        """What `update` gives, which may change the weights; the model then has them."""
        found = update()
        self.publish()
        return found

    def over_pieces(self, sums: torch.Tensor) -> torch.Tensor:
        """What was summed over examples of which each process computes a piece."""
        return sums

    def computing(self, objective: Objective) -> AbstractContextManager[None]:
        """To be entered around everything that computes with the model."""
        return objective.computing()

    def adopt(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups of the model as groups of its masters."""
        return [group | {"params": [self.weights[name] for name in group["names"]]} for group in groups]

    def hold(self, names: Iterable[str]) -> None:
        """Lets parameters stand still: they take no gradients, and the optimizer passes over them."""
        for name in names:
            weight = self.weights[name]
            assert weight.grad is not None, "what is held is not held twice"
            self._held[name], weight.grad = weight.grad, None
            self._own[name].requires_grad_(False)

    def let_go(self, names: Iterable[str]) -> None:
        """Lets them move again."""
        for name in names:
            self._own[name].requires_grad_(True)
            self.weights[name].grad = self._held.pop(name)

    def forget_gradients(self) -> None:
        """Begins a step anew."""
        self._touched.clear()
        for name, parameter in self._own.items():
            if name in self._cast:
                parameter.grad = None
            elif name not in self._held:
                self.weights[name].grad.zero_()  # type: ignore[union-attr]

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients."""
        return float(square_of(self.gradients).sqrt())

    def finish_gradients(self) -> None:
        """Ends the backward passes of a step: what got no gradient in any of them has one of zeros."""
        for name in self.copied:
            if name not in self._touched and name not in self._held:
                self.weights[name].grad.zero_()  # type: ignore[union-attr]

    def sum_gradients(self) -> None:
        """Sums the gradients over all processes."""
        torch.distributed.all_reduce(self.gradients)

    @torch.no_grad()
    def publish(self) -> None:
        """Gives the model what the optimizer has changed."""
        for name in self.copied:
            self._own[name].copy_(self.weights[name])

    def anchor(self, names: Iterable[str], strength: float) -> None:
        """From now on, `pull` draws these weights towards what they are now."""
        self._anchors = {name: self.weights[name].detach().clone() for name in names if name in self.weights}
        self._strength = strength

    @torch.no_grad()
    def pull(self, groups: list[dict[str, Any]]) -> None:
        """Moves each anchored weight by its group's rate times the strength of the way back.

        As weight decay apart from the gradient, but towards the weights that were learnt before (L2-SP, Li et al., 2018:
        https://arxiv.org/abs/1802.01483).
        """
        if not self._anchors:
            return
        for group in groups:
            for name in group["names"]:
                if name in self._anchors and name not in self._held:
                    self.weights[name].lerp_(self._anchors[name], min(1.0, group["lr"] * self._strength))

    def release(self) -> None:
        """Lets go of the gradients; no step can be taken any more."""
        for weight in self.weights.values():
            weight.grad = None
        del self.gradients

    def saved(self) -> dict[str, torch.Tensor]:
        """What training changes, on the CPU: these weights, and the buffers that are saved with a model.

        Of what is spread over processes, this one's rows.
        """
        return {name: t.detach().cpu().contiguous() for name, t in self._saved().items()}

    def whole(self) -> dict[str, torch.Tensor]:
        """The same in full in the first process, whatever is spread; every process must call it."""
        return self.saved()

    def outlines(self) -> dict[str, torch.Tensor]:
        """What `whole` gives, on the meta device."""
        return {name: t.detach().to("meta") for name, t in self._saved().items()}

    def parts(self, rows: dict[str, tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What this process saves of tensors that belong to parameters, on the CPU: names to the parameter's and the tensor."""
        return {key: tensor.detach().cpu().contiguous() for key, (_, tensor) in rows.items()}

    def writers(self, silence: timedelta) -> Writers:
        """Who writes a checkpoint, and waits so long for each other; every process must call it."""
        return Writers()

    def rows(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        """What of a tensor that belongs to a parameter belongs to this process: all."""
        return whole

    def _saved(self) -> dict[str, torch.Tensor]:
        return {**self.weights, **self._saved_buffers()}

    def _saved_buffers(self) -> dict[str, torch.Tensor]:
        saved = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in saved}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what `whole` gave, or all that `saved` gave in each; meta tensors stand for what is to stay."""
        for name, known in self._saved().items():
            value = tensors[name]
            if not value.is_meta:
                known.copy_(self.rows(name, value))
        self.publish()

    @contextmanager
    def in_full(self) -> Iterator[Any]:
        """The model with all its weights in full precision, the frozen ones bit-identical to what they were."""
        parameters = dict(self.model.named_parameters())
        full = self._full_weights() | self.frozen
        full |= {n: p.data.float() for n, p in parameters.items() if n in self._cast and n not in full}
        computing = {name: parameters[name].data for name in full}
        for name, tensor in full.items():
            parameters[name].data = tensor.to(computing[name].device)
        try:
            yield self.model
        finally:
            for name, tensor in computing.items():
                parameters[name].data = tensor

    def _full_weights(self) -> dict[str, torch.Tensor]:
        """In fp32 what the model computes with copies of, whole."""
        return {name: self.weights[name].data for name in self.copied}

    def _collector(self, name: str) -> Callable[[torch.Tensor], None]:
        """Takes a parameter's gradient over as soon as it is whole, so that never all of them exist twice."""

        def collect(parameter: torch.Tensor) -> None:
            target, gradient = self.weights[name].grad, parameter.grad
            assert target is not None, "masters keep their gradients"
            if gradient is None:  # an embedding has handed it over already
                return
            if name not in self._touched:
                self._touched.add(name)
                target.zero_().add_(gradient) if gradient.is_sparse else target.copy_(gradient)
            elif gradient.is_sparse or not gradient.is_cpu:
                target.add_(gradient)
            else:  # in parts: a CPU would first cast the whole to fp32
                parts = zip(target.view(-1).split(_CACHED), gradient.reshape(-1).split(_CACHED), strict=True)
                for some, more in parts:
                    some.add_(more)
            parameter.grad = None

        return collect


def square_of(numbers: torch.Tensor) -> torch.Tensor:
    """The sum of their squares, shape (), fp64. One sum in fp32 over so many numbers would lose a percent of it."""
    return torch.stack([torch.dot(part, part) for part in numbers.split(_SUMMED)]).double().sum()


def loses_bits(tensor: torch.Tensor) -> bool:
    """True when bf16 does not hold these fp32 numbers exactly; weights that were saved in bf16 lose nothing."""
    return tensor.is_meta or not torch.equal(tensor.to(torch.bfloat16).float(), tensor)


class Average:
    """An exponential moving average of the masters, in fp32 (Polyak and Juditsky, 1992).

    After n steps it forgets with min(decay, (1 + n) / (10 + n)), so that the first steps do not weigh for ever.
    """

    def __init__(self, masters: Masters, decay: float) -> None:
        self._masters, self._decay = masters, decay
        self.tensors = {name: weight.detach().clone() for name, weight in masters.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after a 1-based step."""
        keep = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.tensors.values()), [weight.data for weight in self._masters.weights.values()], 1 - keep
        )

    def saved(self) -> dict[str, torch.Tensor]:
        """The averages on the CPU, as `Masters.saved` gives the weights."""
        return self._masters.parts({name: (name, tensor) for name, tensor in self.tensors.items()})

    def outlines(self) -> dict[str, torch.Tensor]:
        """What all processes' `saved` make, on the meta device."""
        outlines = self._masters.outlines()
        return {name: outlines[name] for name in self.tensors}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Puts back what `saved` gave, by names with a prefix; meta tensors stand for what is to stay."""
        for name, own in self.tensors.items():
            value = tensors[prefix + name]
            if not value.is_meta:
                own.copy_(self._masters.rows(name, value))

    def settle(self) -> None:
        """Makes the averages the model's weights, for good."""
        self._swap()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages as its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._masters.weights.items():  # in place: others know the weights' memory
            before = weight.detach().clone()
            weight.copy_(self.tensors[name])
            self.tensors[name].copy_(before)
        self._masters.publish()
