"""Slices by a column: its values, or ranges of its numbers; what is missing stands by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest

from llmkit.stages.slices import _as_slices, parts_of

NUMBERS = [float(number) for number in range(40)]
QUARTERS = ["0-9", "10-19", "20-29", "30-39"]


@pytest.mark.parametrize("missing", [[], [None], [math.nan], [None, math.nan, None]])
def test_numbers_are_binned_whatever_is_missing(missing: list[Any]) -> None:
    found = _as_slices([*missing, *NUMBERS])
    assert found[: len(missing)] == ["(none)"] * len(missing)
    assert [value for value, _ in parts_of(found)] == QUARTERS + ["(none)"] * bool(missing)
    assert [found.count(value) for value in QUARTERS] == [10] * 4


def test_what_is_not_finite_is_a_slice_of_its_own() -> None:
    found = _as_slices([*NUMBERS, math.inf])
    assert found[-1] == "inf"
    assert set(found[:-1]) == set(QUARTERS)


def test_few_numbers_are_slices_each_and_words_are_not_binned() -> None:
    assert _as_slices([1, 2, math.nan, None]) == ["1", "2", "(none)", "(none)"]
    assert _as_slices(["a", None, 2.5, True]) == ["a", "(none)", "2.5", "True"]
    rare = _as_slices(["x", "x", *(f"v{number}" for number in range(40))])
    assert rare[:2] == ["x", "x"]
    assert "(other values)" in rare
