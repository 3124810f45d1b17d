"""Dropout at the price of a few passes over memory: on a CPU, PyTorch's own costs more than the products around it.

It draws one random number an element and multiplies with a mask of another type. Here one draw of 64 bits serves four
elements of bf16 (two of fp32), and the mask is a bit pattern.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Draws:
    """Masks of what dropout keeps, from random integers as wide as the numbers of a type.

    A rate is rounded to 1/65,536 in bf16 and fp16, to 1/4,294,967,296 in fp32; `factor` is what kept numbers are to be
    multiplied with, for the rounded rate. PyTorch's random state decides what is drawn.
    """

    def __init__(self, rate: float, dtype: torch.dtype) -> None:
        self._dtype = _INTEGERS[dtype.itemsize]
        values = 256**dtype.itemsize
        dropped = min(round(rate * values), values - 1)
        self._limit = dropped - values // 2
        self.factor = values / (values - dropped)
        self._generator = np.random.Generator(np.random.SFC64(int(torch.empty((), dtype=torch.int64).random_())))

    def mask(self, like: torch.Tensor) -> torch.Tensor:
        """Integers in the shape of a tensor: all bits set where a number is kept, none where it is dropped."""
        words = max(1, -(-like.numel() * like.element_size() // 8))
        if like.is_cpu:
            drawn = torch.from_numpy(self._generator.integers(-(2**63), 2**63, words, np.int64))
        else:
            drawn = torch.empty(words, dtype=torch.int64, device=like.device).random_(-(2**63), None)
        return drawn.view(self._dtype)[: like.numel()].view(like.shape).ge_(self._limit).neg_()


class SignDropout:
    """Dropout of numbers that are not negative: a minus sign marks what was kept, and no mask has to be."""

    def __init__(self, rate: float, dtype: torch.dtype) -> None:
        self._draws = Draws(rate, dtype)
        self.factor = self._draws.factor

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with 0 for what is dropped; in `x` itself what is kept gets a minus sign."""
        mask = self._draws.mask(x)
        used = _kept(x, mask)
        x.view(mask.dtype).bitwise_or_(mask.bitwise_left_shift_(8 * x.element_size() - 1))
        return used

    @staticmethod
    def undo(x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What was used, what was given, and the gradient of the first as that of the second, in place."""
        bits = 8 * x.element_size()
        signed = x.view(_INTEGERS[x.element_size()])
        mask = signed >> (bits - 1)  # all bits of what is kept
        given = signed & (2 ** (bits - 1) - 1)
        gradient.view(mask.dtype).bitwise_and_(mask)
        return (given & mask).view(x.dtype), given.view(x.dtype), gradient


class FastDropout(nn.Dropout):
    """`nn.Dropout` in fewer passes over memory, on a CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same."""
        if not self.training or self.p == 0.0:
            return x
        dropped: torch.Tensor = _Dropout.apply(x, self.p)
        return dropped


def fast_dropout(module: nn.Module) -> nn.Module | None:
    """What a dropout is to be replaced by, or None when the module is none, or drops nothing."""
    if type(module) is not nn.Dropout or module.p in (0.0, 1.0):
        return None
    return FastDropout(module.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rate: float) -> torch.Tensor:
        draws = Draws(rate, x.dtype)
        ctx.factor = draws.factor
        mask = draws.mask(x)
        ctx.save_for_backward(mask)
        return _kept(x, mask).mul_(draws.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return _kept(gradients[0], mask).mul_(ctx.factor), None


def _kept(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x.view(mask.dtype) & mask).view(x.dtype)
