"""Which numbers a model computes with, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from llmkit.errors import ResourceError
from llmkit.model.precision import choose_precision, slow_precision

CPU = torch.device("cpu")


@pytest.fixture(params=["", "amx_bf16", "avx512_bf16"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A CPU with a unit for bf16, or with none."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, request.param: True})
    found: str = request.param
    return found


def test_bf16_is_chosen_where_it_is_fast_and_the_reason_is_said(unit: str) -> None:
    expected = ("bf16", f"this CPU has {unit}") if unit else ("fp32", "no fast bf16 on this cpu")
    assert choose_precision("auto", CPU) == expected


def test_what_a_recipe_names_is_taken_and_warned_of_where_it_is_slow(unit: str) -> None:
    assert choose_precision("bf16", CPU) == ("bf16", None)
    assert (slow_precision("bf16", CPU) is None) == bool(unit)
    assert slow_precision("fp32", CPU) is None


def test_a_cpu_does_not_train_in_fp16() -> None:
    with pytest.raises(ResourceError, match="fp16 training needs a GPU"):
        choose_precision("fp16", CPU)
