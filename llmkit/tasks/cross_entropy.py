"""The cross entropy of hidden states in chunks: no tensor of all tokens by all words is ever whole in memory.

Shapes: S supervised tokens, D hidden size, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

Logits = Callable[[torch.Tensor], torch.Tensor]


def summed_cross_entropy(
    hidden: torch.Tensor, targets: torch.Tensor, logits: Logits, weights: tuple[torch.Tensor, ...], smoothing: float
) -> torch.Tensor:
    """The sum over S tokens of the cross entropy of `logits(hidden)`, (S, D) to (S, V), in nats; a scalar in fp32.

    `weights` are the parameters that `logits` uses. A chunk's gradients are taken as soon as its loss is known, so that
    its logits can go; label smoothing as in Szegedy et al., 2015: https://arxiv.org/abs/1512.00567.
    """
    if not torch.is_grad_enabled():
        return sum(
            (
                F.cross_entropy(logits(h).float(), t, reduction="sum", label_smoothing=smoothing)
                for h, t in _chunks(hidden, targets, weights)
            ),
            start=hidden.new_zeros((), dtype=torch.float32),
        )
    trained = tuple(weight for weight in weights if weight.requires_grad)
    return _Chunked.apply(hidden, targets, logits, weights, smoothing, *trained)


@torch.no_grad()
def losses_and_hits(
    hidden: torch.Tensor, targets: torch.Tensor, logits: Logits, weights: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross entropy of each token, (S,) in fp32, and whether it has the largest logit, (S,); both on the CPU."""
    losses, hits = [], []
    for part, wanted in _chunks(hidden, targets, weights):
        found = logits(part).float()
        losses.append(F.cross_entropy(found, wanted, reduction="none"))
        hits.append(found.argmax(dim=-1) == wanted)
    return torch.cat(losses).cpu(), torch.cat(hits).cpu()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Any, targets: Any, logits: Logits, weights: Any, smoothing: float, *trained: Any
    ) -> torch.Tensor:
        wants_hidden = hidden.requires_grad
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_gradients: list[torch.Tensor] = []
        sums: list[torch.Tensor] = []
        for part, wanted in _chunks(hidden, targets, weights):
            with torch.enable_grad():
                own = part.detach().requires_grad_(wants_hidden)
                raw = logits(own)
            loss, slope = _loss_and_slope(raw.detach(), wanted, smoothing)
            found = list(torch.autograd.grad(raw, ([own] if wants_hidden else []) + list(trained), slope))
            total += loss
            if wants_hidden:
                hidden_gradients.append(found.pop(0))
            sums = [old.float().add_(new) for old, new in zip(sums, found, strict=True)] if sums else found
        ctx.hidden_gradient = torch.cat(hidden_gradients) if hidden_gradients else None
        ctx.weight_gradients = [g.to(w.dtype) for g, w in zip(sums, trained, strict=True)]
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        """The gradients taken in the forward, times the loss's own; they are used up."""
        scale, hidden, weights = outer[0], ctx.hidden_gradient, ctx.weight_gradients
        del ctx.hidden_gradient, ctx.weight_gradients  # the last to know them: else autograd would copy each
        if scale.device.type != "cpu" or scale != 1:
            hidden = None if hidden is None else hidden.mul_(scale)
            weights = [gradient.mul_(scale) for gradient in weights]
        return hidden, None, None, None, None, *weights


def _loss_and_slope(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross entropy of (S, V) logits, and its gradient with respect to them, in few passes over memory."""
    found = logits.to(torch.float32, copy=True)
    sums, rows = found.logsumexp(dim=-1), targets[:, None]
    loss = sums - (1 - smoothing) * found.gather(1, rows)[:, 0]
    if smoothing:
        loss -= smoothing * found.mean(dim=-1)
    slope = found.sub_(sums[:, None]).exp_()  # the probabilities
    if smoothing:
        slope -= smoothing / slope.shape[1]
    slope.scatter_add_(1, rows, torch.full_like(rows, smoothing - 1, dtype=slope.dtype))
    return loss.sum(), slope.to(logits.dtype)


def _chunks(
    hidden: torch.Tensor, targets: torch.Tensor, weights: tuple[torch.Tensor, ...]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of so many tokens that their fp32 logits take some 64 MiB on a CPU, and 256 MiB on a GPU.

    12 MiB where no weight learns: each part then costs nothing of its own, and the heap has such blocks at hand.
    """
    words = max((weight.shape[0] for weight in weights), default=hidden.shape[-1])  # without weights they are logits
    small = not any(weight.requires_grad for weight in weights)
    most = 2**28 if hidden.is_cuda else 12 * 2**20 if small else 2**26
    size = max(64, most // (4 * words))
    return zip(hidden.split(size), targets.split(size), strict=True)
