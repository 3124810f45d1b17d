"""The arithmetic of attention: explicit products, PyTorch's own, and shapes alone.

Shapes: B rows, H heads, K key and value heads, L tokens of one example, D numbers a head.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

_LONGEST_EXPLICIT = 1024  # tokens; the L x L probabilities of longer examples would take more memory than all else


def causal_example(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One example's attention: (1, H, L, D) to (1, L, H, D); the queries are those of the last L keys."""
    length, width = q.shape[2], k.shape[2]
    window = None if window is None or window >= width else window
    explicit = softcap or width <= _LONGEST_EXPLICIT
    if not explicit and q.is_meta:
        return Outline.apply(q, k, v)
    bias = causal_bias(width, window, q.dtype, q.device)[-length:] if explicit or window or length < width else None
    if explicit:
        return explicit_attention(q, k, v, bias, scale, dropout, softcap)
    grouped = q.shape[1] != k.shape[1]
    found = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=bias is None, scale=scale, enable_gqa=grouped
    )
    return found.transpose(1, 2)


def explicit_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    dropout: float,
    softcap: float | None,
) -> torch.Tensor:
    """`Products` in one type of numbers: under autocast, rotary embeddings leave queries and keys in fp32."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    bias = None if bias is None else bias.to(v.dtype)
    device = v.device.type
    with torch.autocast(device, enabled=False) if device != "meta" else nullcontext():
        return Products.apply(q, k, v, bias, scale, dropout, softcap)


class Outline(torch.autograd.Function):
    """Keeps for the backward what FlashAttention keeps: no L x L tensor, but the scores' log-sums in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
        rows, heads, length, _ = q.shape
        found = q.new_empty(rows, length, heads, v.shape[-1])
        sums = torch.empty(rows, heads, length, dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, found, sums)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class Products(torch.autograd.Function):
    """softmax(scale q k' + bias) v, with the probabilities kept for the backward. Query heads share keys in groups."""

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, bias: Any, scale: float, dropout: float, softcap: float | None
    ) -> Any:
        rows, heads, length, size = q.shape
        shared, width = k.shape[1], k.shape[2]
        grouped = (rows * shared, heads // shared * length, size)
        q, k = q.reshape(grouped), k.reshape(rows * shared, width, size)
        v = v.reshape(rows * shared, width, v.shape[-1])
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        slope = None
        if softcap:
            tanh = scores.div_(softcap).tanh_()
            slope = 1 - tanh.square()
            scores = tanh * softcap
        if bias is not None:
            scores.view(rows, heads, length, width).add_(bias)
        probabilities = torch.softmax(scores, dim=-1)
        used, kept = (
            torch.native_dropout(probabilities, dropout, train=True) if dropout else (probabilities, None)
        )  # kept: which of them dropout left
        ctx.save_for_backward(q, k, v, probabilities, kept, slope)
        ctx.scale, ctx.dropout, ctx.shape = scale, dropout, (rows, heads, shared, length, width, size)
        found = torch.bmm(used, v).view(rows, heads, length, v.shape[-1])
        return found.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, probabilities, kept, slope = ctx.saved_tensors
        rows, heads, shared, length, width, size = ctx.shape
        value_size = v.shape[-1]
        out = gradients[0].transpose(1, 2).reshape(rows * shared, heads // shared * length, value_size)
        used = probabilities if kept is None else probabilities * kept / (1 - ctx.dropout)
        v_gradient = torch.bmm(used.transpose(1, 2), out)
        inner = torch.bmm(out, v.transpose(1, 2))
        if kept is not None:
            inner = inner * kept / (1 - ctx.dropout)
        scores = torch._softmax_backward_data(inner, probabilities, -1, probabilities.dtype)
        scores = scores.mul_(ctx.scale) if slope is None else scores * slope * ctx.scale
        q_gradient = torch.bmm(scores, k).view(rows, heads, length, size)
        k_gradient = torch.bmm(scores.transpose(1, 2), q).view(rows, shared, width, size)
        return q_gradient, k_gradient, v_gradient.view(rows, shared, width, value_size), None, None, None, None


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _whole_bias(size: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(size, size): 0 where a token may look, minus infinity at what comes after it and before its window."""
    ahead = torch.ones(size, size, dtype=torch.bool, device=device).triu(1)
    hidden = ahead if window is None else ahead | torch.ones_like(ahead).tril(-window)
    return torch.zeros(size, size, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def causal_bias(length: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    size = 1 << max(8, (length - 1).bit_length())
    return _whole_bias(size, window, dtype, device)[:length, :length]


@lru_cache(maxsize=1)
def varlen_options() -> frozenset[str] | None:
    """The options of PyTorch's variable-length attention, or None where this PyTorch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return frozenset(inspect.signature(varlen_attn).parameters)


def varlen_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """PyTorch's variable-length FlashAttention: (1, H, T, D) to (1, T, H, D)."""
    from torch.nn.attention.varlen import varlen_attn

    known = varlen_options() or frozenset()
    options: dict[str, Any] = {"scale": scale} if "scale" in known else {}
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)  # none after the token itself: causal
    else:
        options["is_causal"] = True
    if "scale" not in known:
        q = q * (scale * q.shape[-1] ** 0.5)  # the kernel divides by the root of D
    if "window_size" not in known and window is not None and window < longest:
        raise NotImplementedError("this PyTorch's variable-length attention has no window")
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, heads, D)
    found = varlen_attn(q, k, v, ends, ends, longest, longest, **options)
    assert isinstance(found, torch.Tensor), "nothing else was asked for"
    return found[None]
