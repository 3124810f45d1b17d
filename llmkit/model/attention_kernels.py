"""The arithmetic of attention: explicit products, PyTorch's own, and shapes alone.

Shapes: B rows, H heads, K key and value heads, L tokens of one example, D numbers a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from llmkit.model.context import Span
from llmkit.model.dropout import SignDropout
from llmkit.model.segments import Seen

_LONGEST_EXPLICIT = 1024  # tokens; the L x L probabilities of longer examples would take more memory than all else
_SCORES_AT_ONCE = 2**21  # 4 MB in bf16: the caches of two cores


def attend_segments(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: Seen, scale: float, dropout: float, softcap: float | None
) -> torch.Tensor:
    """The attention of some packed segments: (1, H, L, D) to (1, L, H, D); the queries are those of the last L keys."""
    explicit = softcap or k.shape[2] <= _LONGEST_EXPLICIT
    if not explicit and q.is_meta:
        return Outline.apply(q, k, v)
    bias = None if seen.plainly_causal and not explicit else seen.bias(q.dtype, q.device)
    if explicit:
        return explicit_attention(q, k, v, bias, scale, dropout, softcap)
    grouped = q.shape[1] != k.shape[1]
    found = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=bias is None, scale=scale, enable_gqa=grouped
    )
    return found.transpose(1, 2)


def attend_spans(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: Sequence[Span],
    scale: float,
    dropout: float,
    softcap: float | None,
    window: int | None,
) -> torch.Tensor:
    """The attention of parts of examples, (1, H, P, D) to (1, P, H, D), to the keys of the whole row, (1, K, T, D)."""
    found, done = [], 0
    for span in spans:
        length = span.end - span.first
        seen = Seen((length,), span.first - span.begin, window=window)
        own = q[:, :, done : done + length]
        k_seen, v_seen = (tensor[:, :, span.begin : span.end] for tensor in (k, v))
        found.append(attend_segments(own, k_seen, v_seen, seen, scale, dropout, softcap))
        done += length
    return torch.cat(found, dim=1)


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
    """softmax(scale q k' + bias) v, with the probabilities kept for the backward. Query heads share keys in groups.

    A few rows at a time, so that what is not kept stays in the processor's cache.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Any, k: Any, v: Any, bias: Any, scale: float, dropout: float, softcap: float | None
    ) -> Any:
        rows, heads, length, size = q.shape
        shared, width = k.shape[1], k.shape[2]
        q = (q * scale).reshape(rows * shared, heads // shared * length, size)
        k, v = (tensor.reshape(rows * shared, width, tensor.shape[-1]) for tensor in (k, v))
        probabilities = q.new_empty(*q.shape[:2], width)
        slopes = torch.empty_like(probabilities) if softcap else None
        found = q.new_empty(*q.shape[:2], v.shape[-1])
        dropping = SignDropout(dropout, q.dtype) if dropout else None
        for some, part in _parts(rows, shared, heads // shared * length * width):
            scores = torch.bmm(q[part], k[part].transpose(1, 2))
            if softcap and slopes is not None:  # both or none
                tanh = scores.div_(softcap).tanh_()
                torch.sub(1, tanh.square(), out=slopes[part])
                scores = tanh.mul_(softcap)
            if bias is not None:
                own = bias if bias.ndim < 4 or len(bias) == 1 else bias[some]
                scores.view(some.stop - some.start, -1, length, width).add_(own)
            used = torch.softmax(scores, dim=-1, out=probabilities[part])
            torch.bmm(dropping.drop(used) if dropping else used, v[part], out=found[part])
        ctx.save_for_backward(q, k, v, probabilities, slopes)
        ctx.scale, ctx.shape, ctx.factor = scale, (rows, heads, length, size), dropping.factor if dropping else None
        found = found.view(rows, heads, length, -1).transpose(1, 2).contiguous()
        return found.mul_(dropping.factor) if dropping else found

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, probabilities, slopes = ctx.saved_tensors
        rows, heads, length, size = ctx.shape
        shared, width = len(k) // rows, k.shape[1]
        out = gradients[0] if ctx.factor is None else gradients[0] * ctx.factor
        out = out.transpose(1, 2).reshape(*q.shape[:2], v.shape[-1])
        q_gradient, k_gradient, v_gradient = (torch.empty_like(tensor) for tensor in (q, k, v))
        for _, part in _parts(rows, shared, heads // shared * length * width):
            used = whole = probabilities[part]
            inner = torch.bmm(out[part], v[part].transpose(1, 2))
            if ctx.factor is not None:
                used, whole, inner = SignDropout.undo(whole, inner)
            torch.bmm(used.transpose(1, 2), out[part], out=v_gradient[part])
            scores = torch._softmax_backward_data(inner, whole, -1, whole.dtype)
            scores = scores if slopes is None else scores.mul_(slopes[part])
            torch.bmm(scores, k[part], out=q_gradient[part])
            torch.bmm(scores.transpose(1, 2), q[part], out=k_gradient[part])
        q_gradient = q_gradient.mul_(ctx.scale).view(rows, heads, length, size)
        k_gradient, v_gradient = (g.view(rows, shared, width, -1) for g in (k_gradient, v_gradient))
        return q_gradient, k_gradient, v_gradient, None, None, None, None


def _parts(rows: int, shared: int, numbers: int) -> Iterator[tuple[slice, slice]]:
    """Some of the rows, and of the rows times heads that share keys, which have so many scores each."""
    if shared * numbers <= _SCORES_AT_ONCE:
        some = _SCORES_AT_ONCE // (shared * numbers)
        for first in range(0, rows, some):
            last = min(first + some, rows)
            yield slice(first, last), slice(first * shared, last * shared)
    else:
        some = max(1, _SCORES_AT_ONCE // numbers)
        for row in range(rows):
            for first in range(row * shared, (row + 1) * shared, some):
                yield slice(row, row + 1), slice(first, min(first + some, (row + 1) * shared))


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
    key_ends: torch.Tensor | None = None,
    longest_keys: int | None = None,
) -> torch.Tensor:
    """PyTorch's variable-length FlashAttention: (1, H, T, D) to (1, T, H, D).

    With other ends for keys, the queries of a segment are those of its last keys, as FlashAttention has it.
    """
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
    key_ends = ends if key_ends is None else key_ends
    found = varlen_attn(q, k, v, ends, key_ends, longest, longest_keys or longest, **options)
    assert isinstance(found, torch.Tensor), "nothing else was asked for"
    return found[None]


def varlen_spans(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span], scale: float, window: int | None
) -> torch.Tensor:
    """`attend_spans` by variable-length FlashAttention."""
    own, seen = [span.end - span.first for span in spans], [span.end - span.begin for span in spans]
    k, v = (torch.cat([tensor[:, :, span.begin : span.end] for span in spans], dim=2) for tensor in (k, v))
    ends, key_ends = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device) for lengths in (own, seen)
    )
    return varlen_attention(q, k, v, ends, max(own), scale, window, key_ends, max(seen))
