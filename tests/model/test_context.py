"""Rows cut over processes: who computes what, and attention to all of a row from a part of it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from llmkit.model.attention import packed_attention
from llmkit.model.context import Context

ENDS = [0, 5, 6, 19, 32]


class Alone(Context):
    """One of some processes, where all keys and values are at hand."""

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return own


@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_token_is_computed_by_one_process(count: int) -> None:
    own = [Context(number, count).places(32) for number in range(count)]
    assert sorted(np.concatenate(own)) == list(range(32))
    assert {len(places) for places in own} == {32 // count}
    work = [sum(places) for places in own]
    assert max(work) == min(work), "later tokens, which look at more, are shared out evenly"


@pytest.mark.parametrize("count", [1, 2, 4])
def test_spans_are_these_tokens_in_their_order(count: int) -> None:
    for number in range(count):
        context = Context(number, count)
        spans = list(context.spans(ENDS))
        assert [token for span in spans for token in range(span.first, span.end)] == context.places(32).tolist()
        assert all((span.begin in ENDS) and span.begin <= span.first for span in spans)
        assert all(any(b <= span.first < span.end <= e for b, e in pairwise(ENDS)) for span in spans)


@pytest.mark.parametrize("options", [{}, {"sliding_window": 4}, {"softcap": 2.0}])
@pytest.mark.parametrize("count", [2, 4])
def test_parts_attend_as_the_whole_row(count: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 32, 8, generator=generator) for heads in (4, 2, 2))
    rows = {"cu_seq_lens_q": torch.tensor(ENDS, dtype=torch.int32), "max_length_q": 13}
    module = torch.nn.Module()
    whole, _ = packed_attention(module, q, k, v, None, **rows, **options)
    for number in range(count):
        context = Alone(number, count)
        own = torch.from_numpy(context.places(32))
        part, _ = packed_attention(module, q[:, :, own], k, v, None, context=context, **rows, **options)
        torch.testing.assert_close(part, whole[:, own])


def test_on_the_meta_device_keys_have_the_length_of_the_row() -> None:
    own = torch.empty(1, 2, 8, 4, device="meta", requires_grad=True)
    found = Context(1, 4).gather(own)
    assert found.shape == (1, 2, 32, 4)
    found.sum().backward()
    assert own.grad is not None
    assert own.grad.shape == own.shape
