"""The cross entropy in chunks is the whole one, without a tensor of all tokens by all words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkit.tasks.cross_entropy import losses_and_hits, summed_cross_entropy

TOKENS, SIZE, WORDS = 300, 8, 200_000  # chunks of 83 tokens
Made = tuple[torch.Tensor, torch.nn.Linear, torch.Tensor]


def made(tokens: int = TOKENS, words: int = WORDS, *, bias: bool = False, dtype: Any = torch.float32) -> Made:
    """Hidden states, an output layer and targets."""
    torch.manual_seed(0)
    head = torch.nn.Linear(SIZE, words, bias=bias).to(dtype)
    hidden = torch.randn(tokens, SIZE).to(dtype).requires_grad_()
    return hidden, head, torch.randint(words, (tokens,))


def in_chunks(hidden: torch.Tensor, head: Any, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return summed_cross_entropy(hidden, targets, head, tuple(head.parameters()), smoothing)


def whole(hidden: torch.Tensor, head: Any, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum", label_smoothing=smoothing)


def gradients(compute: Callable[..., torch.Tensor], made: Made, *rest: Any, scale: float = 0.125) -> list[Any]:
    hidden, head, targets = made
    hidden.grad = None
    head.zero_grad()
    loss = compute(hidden, head, targets, *rest)
    (loss * scale).backward()
    return [loss.detach(), hidden.grad, *(p.grad for p in head.parameters())]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_equal_the_whole(bias: bool, smoothing: float) -> None:
    given = made(bias=bias)
    found, expected = gradients(in_chunks, given, smoothing), gradients(whole, given, smoothing)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    for one, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 83, 84, 166])
def test_any_number_of_tokens(tokens: int) -> None:
    given = made(tokens)
    found, expected = gradients(in_chunks, given), gradients(whole, given)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: str) -> None:
    given = made()
    expected = gradients(whole, given)
    given[1].requires_grad_(frozen != "head")
    given[0].requires_grad_(frozen != "hidden")
    found = gradients(in_chunks, given)
    assert found[1 if frozen == "hidden" else 2] is None
    kept = 2 if frozen == "hidden" else 1
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-4)


def test_a_head_that_is_used_elsewhere_too_adds_up() -> None:
    """As tied embeddings are."""
    hidden, head, targets = made(words=100)

    def tied(compute: Any) -> torch.Tensor:
        head.zero_grad()
        (compute(head.weight[targets] + hidden, head, targets)).backward()
        assert head.weight.grad is not None
        return head.weight.grad.clone()

    torch.testing.assert_close(tied(in_chunks), tied(whole), atol=1e-5, rtol=1e-4)


def test_logits_that_are_there_already() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(100, 50, requires_grad=True), torch.randint(50, (100,))
    loss = summed_cross_entropy(logits, targets, lambda found: found, (), 0.0)
    (found,) = torch.autograd.grad(loss, logits)
    reference = F.cross_entropy(logits, targets, reduction="sum")
    (expected,) = torch.autograd.grad(reference, logits)
    torch.testing.assert_close(loss, reference)
    torch.testing.assert_close(found, expected)


def test_without_gradients_and_with_hits() -> None:
    hidden, head, targets = made()
    with torch.no_grad():
        expected = whole(hidden, head, targets)
        best = head(hidden).argmax(dim=-1)
        targets[::3] = best[::3]
        expected = whole(hidden, head, targets)
        torch.testing.assert_close(in_chunks(hidden, head, targets), expected)
        losses, hits = losses_and_hits(hidden, targets, head, tuple(head.parameters()))
    assert losses.shape == hits.shape == targets.shape
    assert losses.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(hits, best == targets)
    assert hits.sum() >= 100


def test_bf16_sums_in_fp32() -> None:
    """The loss is that of fp32 but for the rounding of each logit; nothing is lost in adding many of them."""
    exact, rounded = made(bias=True), made(bias=True, dtype=torch.bfloat16)
    expected, found = gradients(whole, exact), gradients(in_chunks, rounded)
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-3)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.float() - other).norm() < 0.02 * other.norm()


class Largest(TorchDispatchMode):
    """Notes the largest fp32 tensor that an operation makes, in numbers."""

    size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
                self.size = max(self.size, leaf.numel())
        return found


def test_no_tensor_is_as_large_as_all_tokens_by_all_words() -> None:
    given = made(dtype=torch.bfloat16)
    with Largest() as seen:
        gradients(in_chunks, given)
    assert seen.size <= 2**24, "64 MiB of fp32"
    assert seen.size < TOKENS * WORDS / 3
    with Largest() as seen, torch.no_grad():
        in_chunks(*given)
        losses_and_hits(given[0], given[2], given[1], tuple(given[1].parameters()))
    assert seen.size <= 2**24
    with Largest() as seen:
        gradients(whole, given)
    assert seen.size >= TOKENS * WORDS, "what it is held against"
