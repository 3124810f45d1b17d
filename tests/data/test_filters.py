"""Filters: what each keeps and takes out, and what is said of a recipe that describes one wrongly."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from llmkit.catalog import names
from llmkit.data.filters import Comparison, build_filters, row_text
from llmkit.errors import RecipeError

CHAT = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}


def test_the_text_of_a_row() -> None:
    assert row_text({"text": "abc", "label": "x"}) == "abc"
    assert row_text(CHAT) == "ab\ncd"


@pytest.mark.parametrize(
    ("text", "out"),
    [
        ("12", "shorter than 3 characters"),
        ("123", None),
        ("éèê12", None),
        ("123456", "longer than 5 characters"),
    ],
)
def test_length_keeps_what_lies_between_its_limits(text: str, out: str | None) -> None:
    ((name, keep),) = build_filters([{"length": {"min_chars": 3, "max_chars": 5}}])
    row = {"text": text}
    assert name == "length"
    assert keep(row) == (out or row)


def test_length_by_default_takes_out_only_what_is_empty() -> None:
    ((_, keep),) = build_filters(["length"])
    assert keep({"text": ""}) == "shorter than 1 characters"
    assert keep({"text": "x" * 10**6}) == {"text": "x" * 10**6}
    assert keep(CHAT) is CHAT


def repeats(rows: list[dict[str, Any]], cuts: tuple[int, ...] = (), out: tuple[int, ...] = ()) -> list[int]:
    """For each row the earlier one that the filter `duplicates` says it repeats; the keys lie in parts."""
    ((_, take),) = build_filters(["duplicates"])
    assert isinstance(take, Comparison)
    assert take.reason == "the same as an earlier row"
    keys = np.stack([take.key(row) for row in rows])
    assert keys.nbytes == 16 * len(rows)
    alive = np.ones(len(rows), bool)
    alive[[*out]] = False
    return [int(number) for number in take.repeats(np.split(keys, cuts), alive)]


SAME: list[dict[str, Any]] = [
    {"text": "a", "label": "x"},
    {"text": "a", "label": "y"},
    {"label": "x", "text": "a"},
    {"text": "a "},
    CHAT,
    {**CHAT, "tools": []},
    CHAT,
    {"text": "A", "label": "x"},
    {"text": "a", "label": "x"},
]


def test_duplicates_keeps_the_first_and_counts_the_label() -> None:
    assert repeats(SAME) == [-1, -1, 0, -1, -1, -1, 4, -1, 0]


@pytest.mark.parametrize("cuts", [(2,), (0, 1, 1, 8, 9)])
def test_duplicates_finds_them_however_the_keys_are_divided(cuts: tuple[int, ...]) -> None:
    assert repeats(SAME, cuts) == repeats(SAME)


def test_duplicates_does_not_see_what_is_out_already() -> None:
    assert repeats(SAME, out=(0, 4)) == [-1, -1, -1, -1, -1, -1, -1, -1, 2]
    assert repeats(SAME, out=tuple(range(9))) == [-1] * 9


def test_duplicates_among_many_rows_are_those_that_a_set_finds() -> None:
    chance = random.Random(2)
    rows = [{"text": f"text {chance.randrange(3000)}"} for _ in range(4000)]
    first: dict[str, int] = {}
    wanted = [first.setdefault(row["text"], at) for at, row in enumerate(rows)]
    assert repeats(rows, (100, 101, 3000)) == [-1 if at == number else number for at, number in enumerate(wanted)]


def test_duplicates_of_no_rows() -> None:
    ((_, take),) = build_filters(["duplicates"])
    assert isinstance(take, Comparison)
    assert take.repeats([take.none(), take.none()], np.zeros(0, bool)).tolist() == []


def test_filters_keep_the_order_of_the_recipe_and_options_may_be_left_out() -> None:
    specs: list[Any] = ["duplicates", {"length": None}, {"length": {"max_chars": None}}]
    assert [name for name, _ in build_filters(specs)] == ["duplicates", "length", "length"]


@pytest.mark.parametrize(
    ("spec", "what", "expected", "hint"),
    [
        ("lenght", "unknown filter `lenght`", "one of " + ", ".join(names("filter")), "did you mean `length`?"),
        (
            {"length": {"min_char": 2}},
            "the filter `length` has no option `min_char`",
            "one of min_chars, max_chars",
            "did you mean `min_chars`?",
        ),
        ({"duplicates": {"x": 2}}, "the filter `duplicates` has no option `x`", "no options", None),
        (
            {"length": {"min_chars": "2"}},
            "the option `min_chars` of the filter `length` has the wrong type",
            "a whole number",
            None,
        ),
        (
            {"length": {"max_chars": True}},
            "the option `max_chars` of the filter `length` has the wrong type",
            "a whole number or null",
            None,
        ),
        ({"length": {"min_chars": 9, "max_chars": 3}}, "the filter `length` cannot be built", None, None),
        ({"length": {"min_chars": -1}}, "the filter `length` cannot be built", None, None),
    ],
)
def test_a_wrong_filter_is_a_recipe_error(spec: Any, what: str, expected: str | None, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        build_filters(["duplicates", spec])
    error = caught.value
    assert (error.what, error.expected, error.hint) == (what, expected, hint)
    assert str(error.where).startswith("data.filters[1]")


@pytest.mark.parametrize("spec", [3, {}, {"length": {}, "duplicates": {}}, {"length": 3}, {1: {}}])
def test_a_filter_of_the_wrong_shape_is_a_recipe_error(spec: Any) -> None:
    with pytest.raises(RecipeError, match="not described as filters are"):
        build_filters([spec])


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        build_filters(["nope", {"length": {"a": 1, "min_chars": None}}])
    assert len(caught.value.problems) == 3
