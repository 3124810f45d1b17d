"""Local steps: processes that train apart for some steps, each on its share of every batch, and then meet in the middle.

What is sent falls by the number of steps in between. With an outer rate of 1 and no momentum the weights become their mean
(Stich, 2019: https://arxiv.org/abs/1805.09767); with a momentum the way that they went together is the gradient of an outer
optimizer with Nesterov's momentum (DiLoCo, Douillard et al., 2023: https://arxiv.org/abs/2311.08105). The moments of the
inner optimizer are averaged too, so that after a meeting all processes are in the same state, and one checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from llmkit.recipe.training import LocalSteps
from llmkit.train.masters import Masters


class Meetings:
    """When processes meet, and what they do then. Every process must call its methods."""

    def __init__(self, rules: LocalSteps, masters: Masters, optimizer: torch.optim.Optimizer, processes: int) -> None:
        self.rules, self._masters, self._optimizer, self._processes = rules, masters, optimizer, processes
        self._velocity = {name: torch.zeros_like(weight) for name, weight in masters.weights.items()}
        self._before: dict[str, torch.Tensor] = {}
        self.begin()

    @torch.no_grad()
    def begin(self) -> None:
        """From now on the weights go apart."""
        self._before = {name: weight.detach().clone() for name, weight in self._masters.weights.items()}

    def due(self, step: int, last: int) -> bool:
        """True when processes meet after a step."""
        return step % self.rules.every == 0 or step >= last

    @torch.no_grad()
    def meet(self) -> None:
        """Brings weights and moments together in all processes."""
        weights, rate, momentum = self._masters.weights, self.rules.outer_lr, self.rules.outer_momentum
        self._average(weights.values())
        self._average(
            value
            for state in self._optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim
        )
        for name, weight in weights.items():
            way = self._before[name].sub_(weight)  # from the mean back to where all began
            velocity = self._velocity[name].mul_(momentum).add_(way)
            weight.add_(way, alpha=1 - rate).sub_(velocity, alpha=rate * momentum)
        self._masters.publish()
        self.begin()

    def saved(self) -> dict[str, torch.Tensor]:
        """The outer optimizer's momentum, by the names of the weights; nothing where there is none."""
        return self._masters.parts({n: (n, t) for n, t in self._velocity.items()}) if self.rules.outer_momentum else {}

    def outlines(self) -> dict[str, torch.Tensor]:
        """What `saved` gives, on the meta device."""
        return {n: t.to("meta") for n, t in self._velocity.items()} if self.rules.outer_momentum else {}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
        """Puts back what `saved` gave, by names with a prefix, beside the weights of that time; meta tensors stand for what
        is to stay.
        """
        for name in self.outlines():
            value = tensors.get(prefix + name)  # one process alone has kept none
            if value is not None and not value.is_meta:
                self._velocity[name].copy_(value)
        self.begin()

    def _average(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
            tensor.div_(self._processes)
