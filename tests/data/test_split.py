"""What is held out is decided by what a row says: stable under order and growth, duplicates on one side."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.data.gather import Request, gather
from llmkit.data.split import Share, copies, held_out, position


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"text": f"This is text number {i}.", "label": "ab"[i % 2]} for i in range(count)]


def chosen(rows: list[dict[str, Any]], share: float) -> set[str]:
    marks = held_out(positions_of(rows), Share(share))
    return {row["text"] for row, mark in zip(rows, marks, strict=True) if mark}


def positions_of(rows: list[dict[str, Any]]) -> np.ndarray:
    return np.array([position(row) for row in rows])


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
        marks = held_out(positions_of(rows_of(count)), Share(share))
        assert any(marks)
        assert not all(marks)
    assert held_out(positions_of(rows_of(count)), Share(0.0001)).sum() == 1


def test_duplicates_in_a_small_set_are_held_out_together() -> None:
    marks = held_out(np.array([0.4, 0.2, 0.2, 0.9]), Share(0.1))
    assert marks.tolist() == [False, True, True, False]


@pytest.mark.parametrize("wanted", [Share(0.5), Share(count=1), Share(fold=(1, 2))])
@pytest.mark.parametrize("positions", [[], [0.1], [0.1, 0.1]])
def test_there_is_nothing_to_hold_out_of_one_distinct_row(wanted: Share, positions: list[float]) -> None:
    found = held_out(np.array(positions), wanted)
    assert (found.shape, found.any()) == ((len(positions),), False)


@pytest.mark.parametrize("count", [1, 7, 100, 499])
def test_a_count_of_rows_is_held_out_exactly(count: int) -> None:
    rows = rows_of(500)
    marks = held_out(positions_of(rows), Share(count=count))
    assert marks.sum() == count
    shuffled = random.Random(1).sample(range(500), 500)
    again = held_out(positions_of([rows[at] for at in shuffled]), Share(count=count))
    assert again.tolist() == marks[shuffled].tolist()
    assert held_out(positions_of(rows), Share(count=min(count + 1, 499)))[marks].all(), "a larger count adds to it"


def test_a_count_never_divides_duplicates() -> None:
    positions = np.array([0.3, 0.1, 0.3, 0.2, 0.3, 0.9])
    for count in range(1, 6):
        marks = held_out(positions, Share(count=count))
        assert len({*marks[positions == 0.3].tolist()}) == 1
        assert marks.sum() == {1: 1, 2: 2, 3: 2, 4: 2, 5: 5}[count], "as many as whole groups allow"


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_folds_hold_out_each_row_once_and_are_of_one_size(folds: int) -> None:
    positions = positions_of(rows_of(203))
    marks = np.array([held_out(positions, Share(fold=(number, folds))) for number in range(1, folds + 1)])
    assert (marks.sum(axis=0) == 1).all()
    sizes = marks.sum(axis=1)
    assert sizes.max() - sizes.min() <= 1


def test_folds_do_not_divide_duplicates_and_do_not_depend_on_the_order() -> None:
    positions = positions_of(rows_of(60))
    positions = np.concatenate([positions, positions[:20], positions[:7]])
    shuffled = np.random.default_rng(1).permutation(len(positions))
    for number in range(1, 5):
        marks = held_out(positions, Share(fold=(number, 4)))
        assert (marks[:20] == marks[60:80]).all()
        assert (marks[:7] == marks[80:]).all()
        assert held_out(positions[shuffled], Share(fold=(number, 4))).tolist() == marks[shuffled].tolist()


@pytest.mark.parametrize("sizes", [(500, 100, 20), (1000, 10, 10, 10), (30, 30)])
def test_of_each_stratum_the_same_share_is_held_out(sizes: tuple[int, ...]) -> None:
    strata = np.repeat(np.arange(len(sizes)), sizes)
    positions = positions_of(rows_of(sum(sizes)))
    for share in (0.1, 0.25, 0.5):
        marks = held_out(positions, Share(share), strata)
        for stratum, size in enumerate(sizes):
            assert abs(marks[strata == stratum].sum() - share * size) <= 0.5
    marks = held_out(positions, Share(count=sum(sizes) // 10), strata)
    for stratum, size in enumerate(sizes):
        assert abs(marks[strata == stratum].sum() - size / 10) <= 1


def test_strata_are_divided_by_content_whatever_the_order() -> None:
    positions, strata = positions_of(rows_of(300)), np.arange(300) % 7 // 3
    marks = held_out(positions, Share(0.2), strata)
    shuffled = np.random.default_rng(1).permutation(300)
    assert held_out(positions[shuffled], Share(0.2), strata[shuffled]).tolist() == marks[shuffled].tolist()
    for stratum in range(3):
        mine = strata == stratum
        assert positions[mine & marks].max() < positions[mine & ~marks].min(), "those of the lowest positions"


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_small_stratum_has_a_row_on_both_sides_and_one_row_is_learnt(share: float) -> None:
    positions, strata = positions_of(rows_of(53)), np.array([0] * 50 + [1] * 2 + [2])
    marks = held_out(positions, Share(share), strata)
    assert marks[50:52].sum() == 1
    assert not marks[52]


@pytest.mark.parametrize("total", [7, 10, 29])
def test_a_count_is_kept_with_strata_too(total: int) -> None:
    positions, strata = positions_of(rows_of(300)), np.arange(300) % 3
    assert held_out(positions, Share(count=total), strata).sum() == total


def test_folds_are_of_one_size_with_strata_too() -> None:
    """Also when no stratum has as many rows as there are folds: none of the folds is empty."""
    positions, strata = positions_of(rows_of(60)), np.arange(60) // 3
    marks = np.array([held_out(positions, Share(fold=(number, 5)), strata) for number in range(1, 6)])
    assert (marks.sum(axis=0) == 1).all()
    assert marks.sum(axis=1).tolist() == [12] * 5


def test_each_stratum_is_spread_over_the_folds() -> None:
    positions, strata = positions_of(rows_of(90)), np.repeat([0, 1, 2], [60, 20, 10])
    for number in range(1, 6):
        marks = held_out(positions, Share(fold=(number, 5)), strata)
        assert [marks[strata == stratum].sum() for stratum in range(3)] == [12, 4, 2]


def test_duplicates_in_two_strata_stay_together() -> None:
    positions = np.repeat(positions_of(rows_of(200)), 2)
    marks = held_out(positions, Share(0.3), np.arange(400) % 2 + np.arange(400) // 200)
    assert (marks[::2] == marks[1::2]).all()


def test_groups_are_held_out_together_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"text {i}", "author": f"author {i * i % 41}"} for i in range(400)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gathered = gather([Request(str(file))], "text", [], tmp_path / "work", group="author")
    places = gathered.rows.column("place")
    authors = len({row["author"] for row in rows})
    for wanted in (Share(0.2), Share(count=90), *(Share(fold=(number, 3)) for number in (1, 2, 3))):
        out = gathered.rows.where(held_out(places, wanted))
        inside = {rows[kept.where.line - 1]["author"] for kept in out}
        assert 0 < len(inside) < authors
        assert len(out) == sum(row["author"] in inside for row in rows)
        assert wanted.count == 0 or 60 < len(out) <= 90, "as many rows as whole groups allow"
    counts = Counter(len(gathered.rows.where(held_out(places, Share(fold=(n, 3))))) for n in (1, 2, 3))
    assert sum(size * times for size, times in counts.items()) == 400


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
