"""RMSprop: gradients divided by a running mean of their size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llmkit.optim.groups import own_groups
from llmkit.optim.options import Beta


def build(
    groups: Iterable[Mapping[str, Any]],
    *,
    lr: float,
    alpha: Beta = 0.99,
    eps: float = 1e-8,
    momentum: Beta = 0.0,
    centered: bool = False,
) -> torch.optim.Optimizer:
    """RMSprop over parameter groups, each with its own `weight_decay` (0 where a group names none).

    The decay is not decoupled: it is added to the gradient (an L2 penalty). It keeps one number a parameter, one more
    with `momentum` and one more when `centered` (by the running mean of the gradient). On a GPU, PyTorch's kernels over
    many tensors at a time (`foreach`). Raises ValueError for an option out of range. Hinton, 2012, lecture 6:
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves, 2013,
    https://arxiv.org/abs/1308.0850.
    """
    return torch.optim.RMSprop(
        own_groups(groups), lr=lr, alpha=alpha, eps=eps, momentum=momentum, centered=centered, weight_decay=0.0
    )
