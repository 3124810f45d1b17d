"""Adagrad: each parameter's rate falls with the sum of its squared gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llmkit.optim.groups import all_on, own_groups


def build(
    groups: Iterable[Mapping[str, Any]], *, lr: float, eps: float = 1e-10, initial_accumulator_value: float = 0.0
) -> torch.optim.Optimizer:
    """Adagrad over parameter groups, each with its own `weight_decay` (0 where a group names none).

    The decay is not decoupled: it is added to the gradient (an L2 penalty). It keeps one number a parameter, allocated at
    once. One fused kernel on a CPU; on a GPU, PyTorch's kernels over many tensors at a time (`foreach`).
    Raises ValueError for an option out of range. Duchi et al., 2011: https://jmlr.org/papers/v12/duchi11a.html.
    """
    own = own_groups(groups)
    return torch.optim.Adagrad(
        own,
        lr=lr,
        eps=eps,
        initial_accumulator_value=initial_accumulator_value,
        weight_decay=0.0,
        fused=True if all_on(own, "cpu") else None,  # there is none for CUDA in PyTorch 2.11
    )
