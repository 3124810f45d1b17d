"""A row of packed examples cut over processes: each computes with its tokens, and attends to the keys and values of all.

A row is cut in twice as many pieces as there are processes, and each gets one from the front and one from the back: later
tokens have more to look at. Keys and values of all come together in each layer, as in Llama 3 (Grattafiori et al., 2024,
section 3.3.2: https://arxiv.org/abs/2407.21783), so that any attention goes with it.

Shapes: K key and value heads, T tokens of the row, P = T / processes, D numbers a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import distributed


@dataclass(frozen=True)
class Span:
    """Tokens of one example that a process computes, `first` to `end` of the row, and where their example begins."""

    begin: int
    first: int
    end: int


@dataclass(frozen=True)
class Context:
    """Process `number` of `count` that share rows; they speak in `group`."""

    number: int
    count: int
    group: Any = None

    @property
    def pieces(self) -> int:
        """In how many pieces of one length a row is cut."""
        return 2 * self.count

    def places(self, length: int) -> np.ndarray:
        """Which tokens of a row this process computes, (P,)."""
        return _places(self.number, self.count, length)

    def spans(self, ends: list[int]) -> Iterator[Span]:
        """The parts of examples that this process computes, in its order; `ends` has 0 and the end of each example."""
        piece = ends[-1] // self.pieces
        for number in (self.number, self.pieces - 1 - self.number):
            first, last = number * piece, (number + 1) * piece
            for begin, end in pairwise(ends):
                if max(begin, first) < min(end, last):
                    yield Span(begin, max(begin, first), min(end, last))

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """What all processes have of a row, in its order: (1, K, P, D) to (1, K, T, D)."""
        found: torch.Tensor = _Gathered.apply(own, self)
        return found


def _places(number: int, count: int, length: int) -> np.ndarray:
    pieces = np.arange(length).reshape(2 * count, -1)
    return np.concatenate([pieces[number], pieces[-1 - number]])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, context: Context) -> torch.Tensor:
        rows = own[0].transpose(0, 1).contiguous()  # (P, K, D)
        found = rows.new_empty(context.count * len(rows), *rows.shape[1:])
        if not own.is_meta:
            distributed.all_gather_into_tensor(found, rows, group=context.group)
        order = np.concatenate([_places(number, context.count, len(found)) for number in range(context.count)])
        ctx.order, ctx.context = torch.from_numpy(order).to(own.device), context
        back = torch.empty_like(ctx.order)
        back[ctx.order] = torch.arange(len(order), device=own.device)
        return found[back].transpose(0, 1)[None]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """Each process's part of the sum over all."""
        rows = gradients[0][0].transpose(0, 1)[ctx.order].contiguous()
        own = rows.new_empty(len(rows) // ctx.context.count, *rows.shape[1:])
        if not own.is_meta:
            distributed.reduce_scatter_tensor(own, rows, group=ctx.context.group)
        return own.transpose(0, 1)[None], None
