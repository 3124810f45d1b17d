"""RMS norms in few passes over memory: Transformers writes them as eight operations, whose backward is most of their time.

Shapes: N tokens, D hidden size.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn


def fused_norm(module: nn.Module) -> nn.Module | None:
    """What an RMS norm is to be replaced by: a faster one with the same parameter.

    A norm is taken for one when its class says so and the replacement gives the same numbers.
    """
    return _replacement(module) if _is_rms_norm(module) else None


def _replacement(module: Any) -> FusedRMSNorm:
    return FusedRMSNorm(module.weight, module.variance_epsilon)


class FusedRMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang and Sennrich, 2019: https://arxiv.org/abs/1910.07467)."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., D)."""
        if hidden.device.type in ("cpu", "meta") and hidden.dtype == self.weight.dtype:
            normed: torch.Tensor = _RMSNorm.apply(hidden, self.weight, self.variance_epsilon)
            return normed
        return F.rms_norm(hidden, self.weight.shape, self.weight.to(hidden.dtype), self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        full = x.float()
        squares = torch.linalg.vector_norm(full, dim=-1, keepdim=True).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1), fp32
        ctx.save_for_backward(x, weight, scale)
        normed = full * scale if full is x else full.mul_(scale)
        return normed.to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """By the kernel of layer norm with a mean of 0, which then subtracts the mean of gradient * weight: given back."""
        (gradient,) = gradients
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        own, _, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, [size], torch.zeros_like(scale), scale, weight.float(), None, [True, False, False]
        )
        mean = torch.mv(gradient.reshape(-1, size), weight).view_as(scale) / size
        own.add_((mean * scale).to(own.dtype))
        if not ctx.needs_input_grad[1]:
            return own, None, None
        by_row = (gradient * x).reshape(-1, size)  # (N, D)
        return own, torch.mm(scale.view(1, -1).to(by_row.dtype), by_row).view_as(weight), None


def _is_rms_norm(module: nn.Module) -> bool:
    if isinstance(module, FusedRMSNorm) or not isinstance(getattr(module, "variance_epsilon", None), float):
        return False
    weight, kind = getattr(module, "weight", None), cast("Any", type(module))
    return isinstance(weight, nn.Parameter) and weight.ndim == 1 and _gives_the_same(kind)


@cache
def _gives_the_same(kind: type[Any]) -> bool:
    """Tries a class on numbers: some families add 1 to the weight."""
    if not kind.__name__.endswith("RMSNorm"):
        return False
    try:
        one: Any = kind(8)
    except TypeError:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, generator=generator)
    with torch.no_grad():
        one.weight.copy_(torch.rand(8, generator=generator) + 0.5)
        return torch.allclose(_replacement(one)(x), one(x), rtol=1e-5, atol=1e-6)
