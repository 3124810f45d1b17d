"""The faster dropout draws as PyTorch's does: with the same odds, from its random state, alike in both directions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmkit.model.dropout import Draws, FastDropout, SignDropout, fast_dropout

TYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 11)]
EMPTY = [(0,), (4, 0, 2)]


def drawn(x: torch.Tensor, rate: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    found: torch.Tensor = FastDropout(rate)(x)
    return found


def layouts(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors of one shape: as it is, transposed, with steps, and one number for all."""
    torch.manual_seed(1)
    plain = torch.rand(shape, dtype=torch.float64).to(dtype) + 0.5
    turned = plain.mT.clone(memory_format=torch.contiguous_format).mT if len(shape) > 1 else plain.clone()
    return [plain, turned, torch.stack([plain, plain], dim=-1)[..., 0], torch.ones((), dtype=dtype).expand(shape)]


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", TYPES)
def test_the_share_that_is_dropped_is_the_rate(dtype: torch.dtype, rate: float) -> None:
    count = 400_001
    found = drawn(torch.ones(count, dtype=dtype), rate)
    exact = round(rate * 256**dtype.itemsize) / 256**dtype.itemsize
    assert abs(exact - rate) <= 2.0**-17
    deviation = math.sqrt(count * rate * (1 - rate))
    assert abs(int((found == 0).sum()) - count * exact) < 5 * deviation
    assert Draws(rate, dtype).factor == pytest.approx(1 / (1 - exact), rel=1e-12)


@pytest.mark.parametrize("dtype", TYPES)
def test_neighbours_and_draws_are_independent(dtype: torch.dtype) -> None:
    """Also those that share one random word, and those of two calls without a seed between them."""
    count = 200_000
    torch.manual_seed(0)
    first, second = ((FastDropout(0.3)(torch.ones(count, dtype=dtype)) == 0).double() - 0.3 for _ in range(2))
    pairs = [(first[:-lag], first[lag:]) for lag in (1, 2, 3, 4, 8)] + [(first, second)]
    for one, other in pairs:
        assert abs(float((one * other).mean())) < 5 * 0.3 * 0.7 / math.sqrt(count)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_kept_is_the_number_times_the_factor_and_the_rest_is_zero(dtype: torch.dtype, rate: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(20_001).to(dtype)
    given = x.clone()
    found = drawn(x, rate)
    kept = drawn(torch.ones_like(x), rate) != 0
    assert torch.equal(found, torch.where(kept, x * Draws(rate, dtype).factor, 0))
    assert torch.equal(x, given)
    assert found.dtype == dtype


@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 0.1), (torch.float32, 0.5), (torch.float64, 0.9)])
def test_the_expectation_is_kept(dtype: torch.dtype, rate: float) -> None:
    x = torch.tensor([-3.0, 0.5, 0.0, 1.0, 8.0], dtype=dtype)
    torch.manual_seed(0)
    many = torch.stack([FastDropout(rate)(x) for _ in range(6000)]).double()
    deviation = x.double().abs() * math.sqrt(rate / (1 - rate) / 6000)
    assert ((many.mean(0) - x).abs() <= 5 * deviation + 2e-3 * x.double().abs()).all()


def test_pytorchs_seed_decides_and_its_state_goes_on() -> None:
    """A run that is resumed with the random state of a step draws what it would have drawn."""
    x = torch.ones(1000)
    assert torch.equal(drawn(x, 0.5, seed=3), drawn(x, 0.5, seed=3))
    assert not torch.equal(drawn(x, 0.5, seed=3), drawn(x, 0.5, seed=4))
    torch.manual_seed(3)
    first = FastDropout(0.5)(x)
    state = torch.get_rng_state()
    second = FastDropout(0.5)(x)
    assert not torch.equal(first, second)
    assert not torch.equal(state, torch.get_rng_state())
    torch.set_rng_state(state)
    assert torch.equal(second, FastDropout(0.5)(x))


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.8])
def test_the_gradient_has_the_same_mask(rate: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: drawn(given, rate), x)
    out = drawn(x, rate)
    (gradient,) = torch.autograd.grad(out, x, torch.ones((), dtype=torch.float64).expand_as(out))
    torch.testing.assert_close(gradient, out.detach() / x.detach())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activations_that_are_computed_again_have_the_same_mask(reentrant: bool) -> None:
    block, gradients = nn.Sequential(nn.Linear(8, 8), FastDropout(0.5)), []
    for wrap in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        x = torch.ones(4, 8, requires_grad=True)
        torch.manual_seed(0)
        wrap(x).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_any_shape_and_layout(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for x in layouts(shape, dtype):
        found = drawn(x.requires_grad_(), 0.5)
        kept = drawn(torch.ones(shape, dtype=dtype), 0.5) != 0
        assert torch.equal(found, torch.where(kept, x * 2, 0))
        (gradient,) = torch.autograd.grad(found, x, torch.ones_like(found))
        assert torch.equal(gradient, kept * torch.tensor(2, dtype=dtype))


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("dtype", TYPES)
def test_nothing_at_all_is_what_it_was(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    found = drawn(x, 0.5)
    assert found.shape == shape
    found.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True), (0.0, False), (1.0, False)])
def test_nothing_is_done_in_evaluation_and_at_rate_zero(rate: float, training: bool) -> None:
    x, state = torch.randn(5), torch.get_rng_state()
    assert FastDropout(rate).train(training)(x) is x
    assert torch.equal(state, torch.get_rng_state())


class OwnDropout(nn.Dropout):
    """A family's own, which may do something else."""


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.0),
        nn.Dropout(1.0),
        OwnDropout(0.5),
        FastDropout(0.5),
        nn.Dropout2d(0.5),
        nn.AlphaDropout(0.5),
        nn.Linear(2, 2),
        nn.Sequential(nn.Dropout(0.5)),
    ],
)
def test_only_dropout_itself_is_replaced_where_it_draws(module: nn.Module) -> None:
    assert fast_dropout(module) is None


def test_the_stand_in_has_the_rate() -> None:
    stand_in = fast_dropout(nn.Dropout(0.25))
    assert isinstance(stand_in, FastDropout)
    assert stand_in.p == 0.25


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_sign_marks_what_is_kept(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Also where a number is exactly 0: in attention, whatever a mask hides."""
    for x in layouts(shape, dtype)[:3]:
        given = x.masked_fill_(torch.rand(shape) < 0.4, 0).clone()
        torch.manual_seed(5)
        kept = Draws(0.4, dtype).mask(x) != 0
        torch.manual_seed(5)
        dropping = SignDropout(0.4, dtype)
        used = dropping.drop(x)
        assert torch.equal(used, given * kept)
        assert torch.equal(x.signbit(), kept)
        assert torch.equal(x.abs(), given)
        gradient = torch.randn(shape).to(dtype)
        expected, marked = gradient * kept, x.clone()
        again, whole, inner = SignDropout.undo(x, gradient)
        assert torch.equal(again, used)
        assert torch.equal(whole, given)
        assert torch.equal(inner, expected)
        assert inner.data_ptr() == gradient.data_ptr()
        assert torch.equal(x.signbit(), marked.signbit()), "a second backward finds the marks again"
        assert dropping.factor == Draws(0.4, dtype).factor
