"""A training whose device runs out of memory above so many tokens at once."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.model.objective import sizes
from llmkit.tasks.causal_objective import CausalObjective
from llmkit.train.loop import Fit


class SmallMemory(CausalObjective):
    """An objective that runs out of memory above so many tokens, in the middle of the backward."""

    most: int
    sizes: list[int]

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        loss = super().loss(model, batch)
        computed = sizes(batch)[1]
        self.sizes.append(computed)
        if computed > self.most:
            loss.register_hook(self._fail) if loss.requires_grad else self._fail(loss)
            torch.rand(3)  # random numbers that the next try must not see as drawn
        return loss

    @staticmethod
    def _fail(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1.00 EiB")


def short_of_memory(fit: Fit, most: int) -> Fit:
    own = fit.objective
    assert isinstance(own, CausalObjective)
    small = SmallMemory(own.causal, own.pad_id, own.regularisation)
    object.__setattr__(small, "most", most)
    object.__setattr__(small, "sizes", [])
    fit.objective = fit.stepper.objective = fit.feeder.objective = small
    return fit
