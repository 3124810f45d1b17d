"""Attention in explicit products, and within packed examples, against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, MT5Config

from llmkit.model.attention import PACKED, PRODUCTS, attention, packed_attention, products_attention
from llmkit.model.attention_kernels import Products
from llmkit.model.segments import Seen

MODULE = torch.nn.Module()
GROUPED = torch.nn.Module()
GROUPED.num_key_value_groups = 2  # type: ignore[assignment]


def inputs(
    rows: int = 2, heads: int = 4, shared: int = 2, length: int = 7, size: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return tuple(  # type: ignore[return-value]
        torch.randn(rows, n, length, size, dtype=dtype, requires_grad=True) for n in (heads, shared, shared)
    )


def reference(q: Any, k: Any, v: Any, bias: Any, scale: float, softcap: float | None = None) -> torch.Tensor:
    """softmax(softcap(scale q k') + bias) v, in the plainest way; (B, L, H, D)."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2)


def with_gradients(compute: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    out = compute(*tensors)
    torch.manual_seed(7)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.randn(out.shape, dtype=out.dtype))]


def same(one: list[torch.Tensor], other: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (4, 2), (6, 1)])
def test_products_equal_the_plain_formula(heads: int, shared: int, window: int | None, softcap: float | None) -> None:
    tensors = inputs(heads=heads, shared=shared)
    bias = Seen((7,), window=window).bias(torch.float32, torch.device("cpu"))
    found = with_gradients(lambda q, k, v: Products.apply(q, k, v, bias, 0.3, 0.0, softcap), tensors)
    same(found, with_gradients(lambda q, k, v: reference(q, k, v, bias, 0.3, softcap), tensors))


@pytest.mark.parametrize("window", [None, 3])
def test_products_equal_pytorchs_attention(window: int | None) -> None:
    tensors = inputs()
    bias = Seen((7,), window=window).bias(torch.float32, torch.device("cpu"))

    def own(q: Any, k: Any, v: Any) -> torch.Tensor:
        options: dict[str, Any] = {"is_causal": True} if window is None else {"attn_mask": bias}
        return F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True, **options).transpose(1, 2)

    same(with_gradients(lambda *t: Products.apply(*t, bias, 0.3, 0.0, None), tensors), with_gradients(own, tensors))


def test_an_additive_mask_of_padded_rows() -> None:
    """(B, 1, L, L), as Transformers makes it: rows of padding have the lowest number everywhere, and stay finite."""
    tensors = inputs(rows=3)
    seen = torch.ones(7, 7, dtype=torch.bool).tril()[None, None].repeat(3, 1, 1, 1)
    seen[1, :, :, :3] = False
    mask = torch.zeros(3, 1, 7, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    found = with_gradients(lambda *t: products_attention(MODULE, *t, mask, scaling=0.3)[0], tensors)
    assert all(tensor.isfinite().all() for tensor in found)
    same(found, with_gradients(lambda *t: reference(*t, mask, 0.3), tensors))


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_the_gradients_are_those_of_small_differences(softcap: float | None) -> None:
    tensors = inputs(rows=1, length=4, size=3, dtype=torch.float64)
    bias = Seen((4,), window=None).bias(torch.float64, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda *t: Products.apply(*t, bias, 0.5, 0.0, softcap), tensors)


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_dropout_has_the_same_mask_in_both_directions(softcap: float | None) -> None:
    tensors = inputs(rows=1, length=4, size=3, dtype=torch.float64)
    bias = Seen((4,), window=None).bias(torch.float64, torch.device("cpu"))

    def seeded(*t: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return Products.apply(*t, bias, 0.5, 0.4, softcap)

    assert torch.autograd.gradcheck(seeded, tensors)
    assert not torch.allclose(seeded(*tensors), Products.apply(*tensors, bias, 0.5, 0.0, softcap))


def test_dropout_keeps_the_expectation() -> None:
    q, k, v = (t.detach() for t in inputs(rows=1, length=5))
    bias = Seen((5,), window=None).bias(torch.float32, torch.device("cpu"))
    drawn = torch.stack([Products.apply(q, k, v, bias, 0.3, 0.3, None) for _ in range(4000)])
    torch.testing.assert_close(drawn.mean(0), reference(q, k, v, bias, 0.3), atol=0.06, rtol=0)


def test_values_may_have_another_width_and_keys_another_length() -> None:
    torch.manual_seed(0)
    tensors = tuple(torch.randn(shape, requires_grad=True) for shape in ((2, 4, 3, 8), (2, 2, 6, 8), (2, 2, 6, 5)))
    same(
        with_gradients(lambda *t: Products.apply(*t, None, 0.3, 0.0, None), tensors),
        with_gradients(lambda *t: reference(*t, None, 0.3), tensors),
    )


def packed(tensors: tuple[torch.Tensor, ...], lengths: list[int], **options: Any) -> torch.Tensor:
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return packed_attention(MODULE, *tensors, None, cu_seq_lens_q=ends, max_length_q=max(lengths), **options)[0]


def each_alone(
    tensors: tuple[torch.Tensor, ...], lengths: list[int], window: int | None, softcap: float | None
) -> torch.Tensor:
    found = []
    for q, k, v in zip(*(t.split(lengths, dim=2) for t in tensors), strict=True):
        length = q.shape[2]
        near = torch.ones(length, length, dtype=torch.bool).tril()
        near &= torch.ones_like(near).triu(1 - window) if window else near
        bias = torch.zeros(length, length).masked_fill(~near, float("-inf"))
        found.append(reference(q, k, v, bias, 0.3, softcap))
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("lengths", [[5], [1, 9, 3], [1, 1, 1], [2, 1050, 3]])
def test_packed_examples_attend_as_if_alone(lengths: list[int], window: int | None, softcap: float | None) -> None:
    tensors = inputs(rows=1, length=sum(lengths), size=4)
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    found = with_gradients(lambda *t: packed(t, lengths, **options), tensors)
    same(found, with_gradients(lambda *t: each_alone(t, lengths, window, softcap), tensors), 2e-5)


def test_the_scale_is_the_root_of_the_size_when_none_is_given() -> None:
    tensors = inputs(rows=1)
    same([packed(tensors, [3, 4])], [packed(tensors, [3, 4], scaling=8**-0.5)])
    bias = Seen((7,), window=None).bias(torch.float32, torch.device("cpu"))
    explicit = products_attention(MODULE, *tensors, bias, scaling=8**-0.5)[0]
    same([products_attention(MODULE, *tensors, bias)[0]], [explicit])


@pytest.mark.parametrize("option", ["s_aux", "position_bias"])
def test_what_packed_attention_cannot_do_it_says(option: str) -> None:
    tensors = inputs(rows=1)
    with pytest.raises(NotImplementedError, match=option):
        packed(tensors, [3, 4], **{option: torch.ones(1)})
    with pytest.raises(NotImplementedError, match="ends of packed examples"):
        packed_attention(MODULE, *tensors, None)


def test_a_position_bias_is_added() -> None:
    """As PyTorch's attention does in Transformers: a bias that is left out would be quietly wrong."""
    tensors, bias = inputs(), torch.randn(1, 4, 7, 7)
    found, _ = products_attention(GROUPED, *tensors, None, scaling=0.3, is_causal=False, position_bias=bias)
    same([found], [reference(*tensors, bias, 0.3)])


def test_a_family_with_a_position_bias_scores_the_same_with_products() -> None:
    config = MT5Config(
        vocab_size=40, d_model=16, d_ff=32, d_kv=4, num_layers=2, num_decoder_layers=2, num_heads=4, num_labels=3
    )
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
        batch = {"input_ids": torch.randint(3, 40, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
        batch["input_ids"][:, -1] = config.eos_token_id
        expected = model(**batch).logits
        with attention(model, packed=False):
            torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_models_own_attention_comes_back() -> None:
    config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModelForCausalLM.from_config(config)
    for is_packed, inside in ((True, PACKED), (False, PRODUCTS)):
        with attention(model, packed=is_packed):
            assert model.config._attn_implementation == inside
            with attention(model, packed=is_packed):
                assert model.config._attn_implementation == inside
            assert model.config._attn_implementation == inside, "an inner use leaves it to the outer one"
        assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), attention(model, packed=True):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_a_mask_that_was_made_in_inference_can_be_trained_with() -> None:
    with torch.inference_mode():
        Seen((300,), window=5).bias(torch.float32, torch.device("cpu"))
    tensors = inputs(rows=1, length=300)
    with_gradients(lambda *t: packed(t, [300], sliding_window=5), tensors)


def test_under_autocast_both_directions_work() -> None:
    """fp16 training computes so: queries and keys come out of the rotary embedding in fp32, values in fp16."""
    q, k, v = (t.detach() for t in inputs())
    bias = Seen((7,), window=None).bias(torch.float32, torch.device("cpu"))
    tensors = (q.requires_grad_(), k.requires_grad_(), v.half().requires_grad_())
    with torch.autocast("cpu", torch.float16):
        out = products_attention(MODULE, *tensors, bias, scaling=0.3)[0]
    assert out.dtype == torch.float16
    expected = reference(*(t.detach().float() for t in tensors), bias, 0.3)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=1e-2)
    found = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert [gradient.dtype for gradient in found] == [t.dtype for t in tensors]


def test_meta_tensors_keep_their_shapes() -> None:
    q, k, v = (t.detach().to("meta") for t in inputs())
    assert products_attention(MODULE, q, k, v, None)[0].shape == (2, 7, 4, 8)


@pytest.mark.parametrize("is_causal", [True, False])
def test_without_a_mask_it_is_causal_where_the_model_says_so(is_causal: bool) -> None:
    tensors = inputs()
    found = with_gradients(
        lambda *t: products_attention(GROUPED, *t, None, scaling=0.3, is_causal=is_causal)[0], tensors
    )
    bias = Seen((7,), window=None).bias(torch.float32, torch.device("cpu")) if is_causal else None
    same(found, with_gradients(lambda *t: reference(*t, bias, 0.3), tensors))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("shared", "lengths"), [(9, [1, 5, 3]), (2, [4]), (1030, [3, 2]), (8, [1050, 1])])
def test_a_shared_beginning_stands_before_each_example(
    shared: int, lengths: list[int], window: int | None, softcap: float | None
) -> None:
    """Its gradients are the sum of those of all examples."""
    tensors = inputs(rows=1, length=shared + sum(lengths), size=4)
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap, "shared_prefix": shared}

    def repeated(*t: torch.Tensor) -> torch.Tensor:
        firsts, rests = zip(*(x.split([shared, sum(lengths)], dim=2) for x in t), strict=True)
        parts = [torch.cat([f, p], dim=2) for f, r in zip(firsts, rests, strict=True) for p in r.split(lengths, dim=2)]
        rows = [tuple(parts[n :: len(lengths)]) for n in range(len(lengths))]
        found = [each_alone(row, [shared + n], window, softcap) for row, n in zip(rows, lengths, strict=True)]
        return torch.cat([found[0][:, :shared], *(f[:, shared:] for f in found)], dim=1)

    found = with_gradients(lambda *t: packed(t, [shared, *lengths], **options), tensors)
    same(found, with_gradients(repeated, tensors), 2e-5)
