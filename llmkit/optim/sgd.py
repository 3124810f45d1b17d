"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llmkit.optim.groups import all_on, own_groups


def build(
    groups: Iterable[Mapping[str, Any]], *, lr: float, momentum: float = 0.9, nesterov: bool = False
) -> torch.optim.Optimizer:
    """SGD over parameter groups, each with its own `weight_decay` (0 where a group names none).

    The decay is not decoupled: it is added to the gradient (an L2 penalty) and goes through the momentum. It keeps one
    number a parameter, half of what AdamW keeps, and updates by one fused kernel where the devices have one.
    Raises ValueError for an option out of range. Sutskever et al., 2013: https://proceedings.mlr.press/v28/sutskever13.html.
    """
    own = own_groups(groups)
    fused = all_on(own, "cpu", "cuda")
    return torch.optim.SGD(own, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=0.0, fused=fused)
