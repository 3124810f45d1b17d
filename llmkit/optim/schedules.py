"""Schedules: pure functions from a step to a multiplier of the learning rate.

`step` is the 0-based index of the step about to be taken. During warm-up the multiplier rises by equal amounts from
`1 / warmup_steps` at step 0 to 1 (linear warm-up: Goyal et al., 2017, https://arxiv.org/abs/1706.02677); every schedule
is 1 at `step == warmup_steps`. After that, progress = (step - warmup_steps) / (total_steps - warmup_steps).
"""

from __future__ import annotations

import math


def constant(step: int, total_steps: int, warmup_steps: int) -> float:
    """Warm-up, then 1."""
    return _warmup(step, warmup_steps)


def linear(step: int, total_steps: int, warmup_steps: int) -> float:
    """Warm-up, then a straight line that meets 0 at `step == total_steps`."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return 1.0 - _progress(step, total_steps, warmup_steps)


def cosine(step: int, total_steps: int, warmup_steps: int) -> float:
    """Warm-up, then half a cosine that meets 0 at `step == total_steps` (https://arxiv.org/abs/1608.03983, no restarts)."""
    if step < warmup_steps:
        return _warmup(step, warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * _progress(step, total_steps, warmup_steps)))


def _warmup(step: int, warmup_steps: int) -> float:
    return (step + 1) / warmup_steps if step < warmup_steps else 1.0


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """The share of the steps after warm-up that is done, in [0, 1]; a total within the warm-up counts as one step."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
