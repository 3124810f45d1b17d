"""The faster embedding's gradients are those of PyTorch's own, wherever they are added up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmkit.model.embedding import FastEmbedding, fast_embedding

ROWS, SIZE = 11, 6
IDS = [
    torch.tensor([[3, 3, 3, 0], [10, 3, 7, 0]]),
    torch.tensor([5]),
    torch.tensor(4),
    torch.randint(ROWS, (2, 3, 50), generator=torch.Generator().manual_seed(0)),
    torch.randint(ROWS, (4, 9), generator=torch.Generator().manual_seed(1)).t()[::2],
    torch.tensor([2, 9, 2], dtype=torch.int32),
]
Pass = Callable[[nn.Embedding, torch.Tensor], torch.Tensor]


def both(padding: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Embedding, FastEmbedding]:
    """PyTorch's own and the faster one, with equal weights that are not the same."""
    embeddings = []
    for _ in range(2):
        torch.manual_seed(0)
        embeddings.append(nn.Embedding(ROWS, SIZE, padding_idx=padding, dtype=dtype))
    own, other = embeddings
    fast = fast_embedding(other)
    assert isinstance(fast, FastEmbedding)
    return own, fast


def untied(embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = embedding(ids)
    torch.manual_seed(2)
    return (out * torch.randn(out.shape).to(out.dtype)).sum()


def tied(embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    """With an output layer of the same weight."""
    return F.linear(embedding(ids).tanh(), embedding.weight).square().sum()


def tied_and_twice(embedding: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return tied(embedding, ids) + embedding(ids.flip(0) if ids.ndim else ids).sum()


def same(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found.to_dense(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(tuple(ids.shape)))
@pytest.mark.parametrize("padding", [None, 0, 3, -1])
@pytest.mark.parametrize("compute", [untied, tied, tied_and_twice])
def test_numbers_and_gradients_are_those_of_pytorch(compute: Pass, padding: int | None, ids: torch.Tensor) -> None:
    own, fast = both(padding)
    assert torch.equal(own(ids), fast(ids))
    for embedding in (own, fast):
        compute(embedding, ids).backward()
    same(fast.weight.grad, own.weight.grad)
    if padding is not None and compute is untied:
        assert fast.weight.grad is not None
        assert not fast.weight.grad.to_dense()[padding].any()


@pytest.mark.parametrize("held", [True, False], ids=["a gradient is held", "none is held"])
@pytest.mark.parametrize("compute", [untied, tied, tied_and_twice])
def test_gradients_of_several_passes_add_up(compute: Pass, held: bool) -> None:
    """In a tensor that is there already, if there is one: of fp32 weights it is a part of all gradients."""
    own, fast = both(padding=0)
    place = torch.ones(ROWS, SIZE)
    for embedding, start in ((own, place.clone()), (fast, place)):
        embedding.weight.grad = start if held else None
        for ids in IDS:
            compute(embedding, ids).backward()
    same(fast.weight.grad, own.weight.grad)
    if held:
        assert fast.weight.grad is place


def test_a_graph_may_be_gone_through_twice() -> None:
    own, fast = both()
    for embedding in (own, fast):
        loss = tied(embedding, IDS[0])
        loss.backward(retain_graph=True)
        loss.backward()
    same(fast.weight.grad, own.weight.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_may_be_computed_again(reentrant: bool) -> None:
    own, fast = both()
    for embedding in (own, fast):
        head = nn.Sequential(embedding, nn.Tanh())
        one = torch.ones((), requires_grad=True)  # reentrant checkpoints want an input with a gradient
        out = checkpoint(lambda x, head=head: head(IDS[3]) * x, one, use_reentrant=reentrant)
        out.square().sum().backward()
    same(fast.weight.grad, own.weight.grad)


@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_ids_at_all(shape: tuple[int, ...]) -> None:
    own, fast = both()
    for embedding in (own, fast):
        tied(embedding, torch.zeros(shape, dtype=torch.long)).backward()
    same(fast.weight.grad, own.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", [untied, tied, tied_and_twice])
def test_hooks_see_the_gradient(compute: Pass, dtype: torch.dtype) -> None:
    """A hook that takes what is there, as that of fp32 masters does, has taken all of it in the end, and once."""
    own, fast = both(padding=0, dtype=dtype)
    taken = torch.zeros(ROWS, SIZE)

    def take(weight: torch.Tensor) -> None:
        if weight.grad is not None:
            taken.add_(weight.grad)
            weight.grad = None

    fast.weight.register_post_accumulate_grad_hook(take)
    expected = torch.zeros(ROWS, SIZE)
    for ids in IDS:
        for embedding in (own, fast):
            compute(embedding, ids).backward()
        assert own.weight.grad is not None
        expected += own.weight.grad
        own.weight.grad = None
    assert fast.weight.grad is None
    error = (taken - expected).norm() / expected.norm()
    assert error <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("compute", [untied, tied])
def test_the_last_that_a_hook_sees_is_the_whole_gradient(compute: Pass) -> None:
    own, fast = both()
    seen: list[torch.Tensor] = []
    fast.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.to_dense().clone()))
    for embedding in (own, fast):
        compute(embedding, IDS[0]).backward()
    same(seen[-1], own.weight.grad)


def test_the_weight_is_the_same_parameter() -> None:
    own = nn.Embedding(ROWS, SIZE, padding_idx=-2)
    fast = fast_embedding(own)
    assert isinstance(fast, FastEmbedding)
    assert fast.weight is own.weight
    assert fast.padding_idx == ROWS - 2
    assert list(fast.state_dict()) == list(own.state_dict())
    assert (fast.num_embeddings, fast.embedding_dim) == (ROWS, SIZE)


def test_a_weight_that_was_made_larger() -> None:
    """Where tokens were added; the module may still say how many there were."""
    own = nn.Embedding(ROWS, SIZE)
    own.weight = nn.Parameter(torch.randn(ROWS + 4, SIZE))
    fast = fast_embedding(own)
    assert fast is not None
    assert torch.equal(fast(torch.tensor([ROWS + 3])), own.weight[[ROWS + 3]])


class OwnEmbedding(nn.Embedding):
    """A family's own, which may scale or shift."""


@pytest.mark.parametrize(
    "module",
    [
        OwnEmbedding(ROWS, SIZE),
        nn.Embedding(ROWS, SIZE, max_norm=1.0),
        nn.Embedding(ROWS, SIZE, scale_grad_by_freq=True),
        fast_embedding(nn.Embedding(ROWS, SIZE)),
        nn.EmbeddingBag(ROWS, SIZE),
        nn.Linear(SIZE, ROWS),
    ],
)
def test_what_does_more_is_left_alone(module: nn.Module) -> None:
    assert fast_embedding(module) is None
