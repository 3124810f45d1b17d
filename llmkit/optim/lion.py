"""Lion: steps of one size, in the direction of the sign of the momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llmkit.optim.groups import own_groups
from llmkit.optim.options import Beta
from llmkit.optim.packages import need


def build(
    groups: Iterable[Mapping[str, Any]], *, lr: float, betas: tuple[Beta, Beta] = (0.9, 0.99)
) -> torch.optim.Optimizer:
    """Lion over parameter groups, each with its own decoupled `weight_decay` (0 where a group names none).

    It keeps one number a parameter. It wants 3 to 10 times less rate than AdamW, and as many times more decay. Needs the
    package lion-pytorch; raises RecipeError without it. Chen et al., 2023: https://arxiv.org/abs/2302.06675.
    """
    library = need("lion", "lion_pytorch", "lion-pytorch", since=(0, 2))
    optimizer: torch.optim.Optimizer = library.Lion(own_groups(groups), lr=lr, betas=betas, weight_decay=0.0)
    return optimizer
