"""Adafactor: second moments of a matrix kept as one number a row and one a column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llmkit.optim.groups import own_groups
from llmkit.optim.options import Beta, NotNegative, Positive


def build(
    groups: Iterable[Mapping[str, Any]],
    *,
    lr: float,
    eps: tuple[NotNegative, NotNegative] = (1e-30, 1e-3),
    clip_threshold: Positive = 1.0,
    decay_rate: float = -0.8,
    beta1: Beta | None = None,
    scale_parameter: bool = False,
) -> torch.optim.Optimizer:
    """Adafactor over parameter groups, each with its own decoupled `weight_decay` (0 where a group names none).

    The rate is the schedule's: the paper's own, relative to the step, is off. `scale_parameter` multiplies it by the root
    mean square of the tensor (at least `eps[1]`). For a matrix of n x m it keeps n + m numbers, and n * m more only with
    `beta1`. It is Transformers', since torch.optim.Adafactor always scales and caps the rate at 1 / sqrt(step).
    Shazeer and Stern, 2018: https://arxiv.org/abs/1804.04235.
    """
    from transformers.optimization import Adafactor

    if decay_rate > 0:
        raise ValueError(f"decay_rate should be 0 or below: {decay_rate}")
    return Adafactor(
        own_groups(groups),
        lr=lr,
        eps=eps,
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        beta1=beta1,
        weight_decay=0.0,
        scale_parameter=scale_parameter,
        relative_step=False,
    )
