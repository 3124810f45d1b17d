"""The fastest forward of a model on its device, without a change to what it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from llmkit.model.attention import attention, attention_outline
from llmkit.model.dropout import fast_dropout
from llmkit.model.embedding import fast_embedding
from llmkit.model.norms import fused_norm
from llmkit.model.replacement import replaced_modules


@contextmanager
def fast_forward(model: Any, *, packed: bool, outline: bool = False) -> Iterator[None]:
    """While entered, the model takes packed examples where `packed`, and does the rest in few passes over memory.

    With `outline`, a model on the meta device takes the memory of a GPU's attention, for a forecast.
    """
    on_cpu = model.device.type in ("cpu", "meta") and not outline
    takes_sparse = model.device.type == "cpu" and not _has(model, "_hp_mapping")  # those that DeepSpeed marks do not
    choices = [fused_norm, *([fast_dropout] if on_cpu else []), *([fast_embedding] if takes_sparse else [])]
    if _has(model, "device_mesh"):
        choices = []  # parameters that are spread over processes belong to their modules

    def choose(module: nn.Module) -> nn.Module | None:
        return next((stand_in for choice in choices if (stand_in := choice(module)) is not None), None)

    with (
        replaced_modules(model, choose),
        attention_outline(model) if outline else attention(model, packed=packed),
    ):
        yield


def _has(model: Any, mark: str) -> bool:
    """True when a parameter has an attribute that those have that are spread over processes."""
    return any(hasattr(parameter, mark) for parameter in model.parameters())
