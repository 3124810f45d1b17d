"""Gradients of embeddings as the rows that were looked up, on a CPU: not as a table of zeros around them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class FastEmbedding(nn.Embedding):
    """`nn.Embedding` that adds its gradient to its weight's own, a sparse one, as soon as it is known.

    Autograd would add it to the gradient that a tied output layer has for the same weight, in a new tensor of both.
    """

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) to (..., D)."""
        if not self.weight.requires_grad:  # it may come to learn later
            return F.embedding(ids, self.weight, self.padding_idx)
        looked_up: torch.Tensor = _Embedding.apply(ids, self.weight, self.padding_idx)
        return looked_up


def fast_embedding(module: nn.Module) -> nn.Module | None:
    """What an embedding is to be replaced by, or None when the module is none."""
    if type(module) is not nn.Embedding or module.max_norm is not None or module.scale_grad_by_freq:
        return None
    rows, size = module.weight.shape
    stand_in = FastEmbedding(rows, size, padding_idx=module.padding_idx, _weight=module.weight)
    stand_in.weight = module.weight  # itself, not a new parameter of it
    return stand_in


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: nn.Parameter, padding: int | None) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return F.embedding(ids, weight, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ids, weight = ctx.saved_tensors[0].flatten(), ctx.weight
        rows = gradients[0].reshape(len(ids), weight.shape[1])
        if ctx.padding is not None:
            rows = rows.masked_fill((ids == ctx.padding)[:, None], 0)
        torch.autograd.backward(weight, torch.sparse_coo_tensor(ids[None], rows, weight.shape, check_invariants=False))
        return None, None, None
