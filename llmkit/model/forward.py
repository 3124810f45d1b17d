"""The fastest forward of a model on its device, without a change to what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llmkit.model.attention import attention, attention_outline
from llmkit.model.norms import fused_norms


@contextmanager
def fast_forward(model: Any, *, packed: bool, outline: bool = False) -> Iterator[None]:
    """While entered, the model takes packed examples where `packed`, and computes attention and norms in few passes.

    With `outline`, a model on the meta device takes the memory of a GPU's attention, for a forecast.
    """
    with fused_norms(model), attention_outline(model) if outline else attention(model, packed=packed):
        yield
