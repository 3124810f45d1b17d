"""Attention for training, plugged in through Transformers' AttentionInterface.

Packed: the examples of a batch follow each other in one row, shape (1, T), and attention stays within each of them; no
T x T mask exists. GPUs run FlashAttention or PyTorch's variable-length attention; elsewhere short examples go together.
Matrix products: on a CPU the backward of PyTorch's own attention is several times slower than the explicit products.

Shapes: B rows, H heads, K key and value heads, G = H / K, L tokens of one example, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from llmkit.model.attention_kernels import (
    Outline,
    attend_segments,
    attend_spans,
    explicit_attention,
    varlen_attention,
    varlen_options,
    varlen_spans,
)
from llmkit.model.context import Context
from llmkit.model.segments import Seen, groups

_MULTIPLE = 32  # tokens: kernels are made for a length, and lengths that are alike use them again
PACKED, PRODUCTS, OUTLINE = "llmkit_packed", "llmkit_products", "llmkit_outline"


@contextmanager
def attention(model: Any, *, packed: bool) -> Iterator[None]:
    """While entered, the model attends within packed examples, or over padded rows in the fastest way of its device."""
    before = model.config._attn_implementation
    with _replaced(model, _implementation(model.device.type, model.dtype, before, packed)):
        yield


@contextmanager
def attention_outline(model: Any) -> Iterator[None]:
    """While entered, a model on the meta device attends with the memory that FlashAttention takes on a GPU."""
    with _replaced(model, OUTLINE):
        yield


@contextmanager
def _replaced(model: Any, wanted: str) -> Iterator[None]:
    before = model.config._attn_implementation
    if wanted == before:
        yield
        return
    _register()
    model.set_attn_implementation(wanted)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _implementation(device: str, dtype: torch.dtype, before: str, packed: bool) -> str:
    from transformers.utils import is_flash_attn_2_available

    if not packed:
        return PRODUCTS if device in ("cpu", "meta") and before == "sdpa" else before
    half = dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if device == "cuda" and half and is_flash_attn_2_available() else PACKED


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    uncompiled = torch.compiler.disable  # which takes a second to import; they would be compiled anew for each length
    AttentionInterface.register(PACKED, uncompiled(packed_attention))
    AttentionMaskInterface.register(PACKED, _no_mask)
    AttentionInterface.register(OUTLINE, outline_attention)
    AttentionMaskInterface.register(OUTLINE, _no_mask)
    AttentionInterface.register(PRODUCTS, uncompiled(products_attention))
    AttentionMaskInterface.register(PRODUCTS, eager_mask)


def _no_mask(*arguments: Any, **options: Any) -> None:
    """Packed attention needs no mask: the ends of the examples say all."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, H, T, D)
    key: torch.Tensor,  # (1, K, T, D)
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,  # (N + 1,): where the examples begin and end
    max_length_q: int | None = None,
    shared_prefix: int = 0,
    context: Context | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each packed example; (1, T, H, D).

    With `shared_prefix`, that is the length of the first segment, which stands before each of the others. With `context`,
    queries, keys and values are those of this process's tokens of the row.
    Raises NotImplementedError for what it cannot do: a model that does not pass the ends of the examples on, or that
    asks for attention sinks or a bias.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise NotImplementedError("the model does not pass the ends of packed examples on to its attention")
    if unknown := [name for name in ("s_aux", "position_bias") if others.get(name) is not None]:
        raise NotImplementedError(f"attention with {unknown[0]}")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    half = query.dtype in (torch.bfloat16, torch.float16) and not shared_prefix
    varlen = query.device.type == "cuda" and half and not dropout and not softcap and varlen_options() is not None
    if context is not None:
        key, value = context.gather(key), context.gather(value)
        spans = list(context.spans(cu_seq_lens_q.tolist()))
        if varlen:
            return varlen_spans(query, key, value, spans, scale, sliding_window), None
        return attend_spans(query, key, value, spans, scale, dropout, softcap, sliding_window), None
    if varlen:
        return varlen_attention(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window), None
    ends, found = cu_seq_lens_q.tolist(), []
    lengths = tuple(end - begin for begin, end in pairwise(ends))
    for first, last in groups(lengths):
        more = min(-(ends[last] - ends[first]) % _MULTIPLE, ends[-1] - ends[last])  # of what follows, to no effect
        part = slice(ends[first], ends[last] + more)
        q, k, v = (t[:, :, part] for t in (query, key, value))
        before = shared_prefix if first else 0
        if before:
            k, v = (torch.cat([t[:, :, :before], own], dim=2) for t, own in ((key, k), (value, v)))
        together = lengths[first:last] + ((more,) if more else ())
        seen = Seen(together, before, bool(shared_prefix) and not first, sliding_window)
        found.append(attend_segments(q, k, v, seen, scale, dropout, softcap)[:, : ends[last] - ends[first]])
    return found[0] if len(found) == 1 else torch.cat(found, dim=1), None


def products_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, H, L, D)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # added to the scores, broadcast to (B, H, L, L)
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over padded rows by explicit matrix products; (B, L, H, D). What has more to it is left to PyTorch's own."""
    causal = others.get("is_causal", getattr(module, "is_causal", False))
    if others.get("position_bias") is not None or (attention_mask is None and causal):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **others)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return explicit_attention(query, key, value, attention_mask, scale, dropout, softcap), None


def outline_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (B, H, L, D)
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    context: Context | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Shapes without numbers; (B, L, H, D)."""
    if context is not None:
        key, value = context.gather(key), context.gather(value)
    return Outline.apply(query, key, value), None
