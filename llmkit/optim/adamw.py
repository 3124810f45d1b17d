"""AdamW: Adam with decoupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llmkit.optim.groups import all_on, own_groups


def build(
    groups: Iterable[Mapping[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """AdamW over parameter groups, each with its own decoupled `weight_decay` (0 where a group names none).

    One fused kernel updates all parameters where their devices have one; the moments are allocated by the first step.
    Raises ValueError for an option out of range. Loshchilov and Hutter, 2017: https://arxiv.org/abs/1711.05101.
    """
    own = own_groups(groups)
    return torch.optim.AdamW(own, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=all_on(own, "cpu", "cuda"))
