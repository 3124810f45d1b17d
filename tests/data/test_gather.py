"""From sources to canonical rows: whatever is left out is counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmkit.data.filters import build_filters
from llmkit.data.gather import Gathered, Request, gather
from llmkit.errors import DataError


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def check_counts(gathered: Gathered) -> None:
    assert gathered.read == len(gathered.rows) + len(gathered.rejected) + len(gathered.filtered)
    assert sum(gathered.taken_by_filter.values()) == len(gathered.filtered)


def test_rows_of_several_sources_in_their_order_each_with_its_place_and_weight(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    second = write(tmp_path / "b.jsonl", [{"body": "three"}])
    gathered = gather([Request(second, weight=0.5), Request(first)], "text", [])
    assert [kept.row for kept in gathered.rows] == [{"text": "three"}, {"text": "one"}, {"text": "two"}]
    assert [(Path(kept.where.source).name, kept.where.line) for kept in gathered.rows] == [
        ("b.jsonl", 1),
        ("a.jsonl", 1),
        ("a.jsonl", 2),
    ]
    assert [kept.weight for kept in gathered.rows] == [0.5, 1.0, 1.0]
    assert gathered.formats[second].columns == {"text": "body"}
    assert gathered.formats[second].guessed
    assert gathered.read == 3
    check_counts(gathered)


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", [{"text": "one"}, "{broken", {"text": "  "}, {"text": 5}, {"text": "two"}])
    done: list[int] = []
    gathered = gather([Request(uri)], "text", [], done.append)
    assert [kept.row["text"] for kept in gathered.rows] == ["one", "two"]
    assert [rejected.where.line for rejected in gathered.rejected] == [2, 3, 4]
    assert gathered.rejected[1].reason == "text is empty"
    assert sum(done) == gathered.read == 5
    check_counts(gathered)


@pytest.mark.parametrize("bad", [1, 20, 30, 100])
def test_the_format_is_told_by_the_first_good_rows_however_late(tmp_path: Path, bad: int) -> None:
    uri = write(tmp_path / "a.jsonl", ["{broken"] * bad + [{"question": "q", "prompt": "a", "completion": "b"}] * 40)
    gathered = gather([Request(uri)], "chat", [])
    assert (len(gathered.rows), len(gathered.rejected), gathered.read) == (40, bad, bad + 40)
    assert gathered.rows[0].where.line == bad + 1
    assert gathered.formats[uri].name == "prompt_completion"
    check_counts(gathered)


def test_only_bad_rows_leave_no_row_and_no_format(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", ["{broken"] * 25)
    gathered = gather([Request(uri)], "text", [])
    assert (gathered.rows, gathered.formats, len(gathered.rejected), gathered.read) == ([], {}, 25, 25)


def test_filters_work_in_order_and_see_the_rows_of_all_sources(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": "a long text"}, {"text": "x"}, {"text": "a long text"}])
    second = write(tmp_path / "b.jsonl", [{"text": "a long text"}, {"text": "x"}, {"text": 7}])
    filters = build_filters([{"length": {"min_chars": 5}}, "duplicates"])
    gathered = gather([Request(first), Request(second)], "text", filters)
    assert [kept.row["text"] for kept in gathered.rows] == ["a long text"]
    assert gathered.taken_by_filter == {"length": 2, "duplicates": 2}
    assert gathered.filtered[0].reason == "filter length: shorter than 5 characters"
    assert [(Path(f.where.source).name, f.where.line) for f in gathered.filtered] == [
        ("a.jsonl", 2),
        ("a.jsonl", 3),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]
    check_counts(gathered)


def test_a_filter_may_change_a_row(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", [{"text": "one"}])
    filters = [("louder", lambda row: {"text": row["text"] + "!"}), ("again", lambda row: {"text": row["text"] * 2})]
    assert gather([Request(uri)], "text", filters).rows[0].row == {"text": "one!one!"}


def test_a_named_format_and_columns_win(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", [{"text": "t", "code": "c", "doc": "d"}])
    request = Request(uri, format="prompt_completion", columns={"prompt": "code", "completion": "doc"})
    gathered = gather([request], "chat", [])
    assert [message["content"] for message in gathered.rows[0].row["messages"]] == ["c", "d"]
    assert gathered.formats[uri].guessed is None


def test_data_of_no_known_format_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", [{"number": 1}])
    with pytest.raises(DataError):
        gather([Request(uri)], "chat", [])
    with pytest.raises(DataError):
        gather([Request(str(tmp_path / "missing.jsonl"))], "chat", [])
