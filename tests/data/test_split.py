"""What is held out is decided by what a row says: stable under order and growth, duplicates on one side."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llmkit.data.split import copies, held_out, position


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"text": f"This is text number {i}.", "label": "ab"[i % 2]} for i in range(count)]


def chosen(rows: list[dict[str, Any]], share: float) -> set[str]:
    marks = held_out([position(row) for row in rows], share)
    return {row["text"] for row, mark in zip(rows, marks, strict=True) if mark}


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2, 0.5])
def test_the_share_is_about_what_was_asked_for(share: float) -> None:
    rows = rows_of(5000)
    deviation = (share * (1 - share) / 5000) ** 0.5
    assert abs(len(chosen(rows, share)) / 5000 - share) < 3 * deviation


def test_order_does_not_matter() -> None:
    rows = rows_of(400)
    shuffled = random.Random(1).sample(rows, len(rows))
    assert chosen(rows, 0.1) == chosen(shuffled, 0.1)


def test_growing_data_moves_no_row() -> None:
    few, many = chosen(rows_of(1000), 0.1), chosen(rows_of(3000), 0.1)
    assert few == {text for text in many if int(text.split()[-1][:-1]) < 1000}


def test_a_larger_share_holds_out_the_same_rows_and_more() -> None:
    assert chosen(rows_of(500), 0.05) < chosen(rows_of(500), 0.2)


@pytest.mark.parametrize(
    "copy",
    [
        {"text": "A Row of  TEXT", "label": "x"},
        {"text": "  a row of text\n", "label": "x"},
        {"text": "a row\nof\ttext", "label": "X "},
        {"label": "x", "text": "a row of text"},
    ],
)
def test_near_copies_stay_together(copy: dict[str, Any]) -> None:
    assert position(copy) == position({"text": "a row of text", "label": "x"})


def test_near_copies_of_conversations_stay_together() -> None:
    def row(question: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes"}]}

    assert position(row(" Is it?")) == position(row("is  it?\n"))
    assert position(row("Is it?")) != position(row("Was it?"))


def test_different_rows_stand_apart() -> None:
    places = [position(row) for row in rows_of(2000)]
    assert len(set(places)) == 2000
    assert all(0 <= place < 1 for place in places)
    assert position({"text": "ab"}) != position({"text": "a b"})


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_a_small_set_has_one_row_or_more_on_both_sides(count: int) -> None:
    for share in (0.001, 0.05, 0.999):
        marks = held_out([position(row) for row in rows_of(count)], share)
        assert any(marks)
        assert not all(marks)
    assert held_out([position(row) for row in rows_of(count)], 0.0001).count(True) == 1


def test_duplicates_in_a_small_set_are_held_out_together() -> None:
    marks = held_out([0.4, 0.2, 0.2, 0.9], 0.1)
    assert marks == [False, True, True, False]


def test_there_is_nothing_to_hold_out_of_one_distinct_row() -> None:
    assert held_out([], 0.5) == []
    assert held_out([0.1], 0.5) == [False]
    assert held_out([0.1, 0.1], 0.5) == [False, False]


def test_copies_by_weight() -> None:
    rows = rows_of(5000)
    assert {copies(row, 1.0) for row in rows} == {1}
    assert {copies(row, 2.0) for row in rows} == {2}
    half = [copies(row, 0.5) for row in rows]
    assert set(half) == {0, 1}
    assert abs(sum(half) / 5000 - 0.5) < 0.03
    more = [copies(row, 2.5) for row in rows]
    assert set(more) == {2, 3}
    assert [count - 2 for count in more] == half, "the same rows, whatever the whole part"


def test_the_weight_is_independent_of_the_split() -> None:
    rows = [row for row in rows_of(5000) if position(row) < 0.2]
    assert abs(sum(copies(row, 0.5) for row in rows) / len(rows) - 0.5) < 0.06
