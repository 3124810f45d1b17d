"""From sources to canonical rows on disk: whatever is left out is counted and named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pieces import short_reads  # noqa: F401

from llmkit.data import gather as module
from llmkit.data import pieces
from llmkit.data.gather import Gathered, Request, gather
from llmkit.errors import DataError

LONG = "a long text"


def write(path: Path, lines: list[Any]) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def left_out(gathered: Gathered) -> list[tuple[str, int, str]]:
    """File, line and reason of each row that was left out, as rejected.jsonl names them."""
    lines = [json.loads(line) for path in gathered.left_out for line in path.read_text().splitlines()]
    return [(Path(line["source"]).name, line["line"], line["reason"]) for line in lines]


def taken(gathered: Gathered) -> dict[str, int]:
    return {name: sum(reasons.values()) for name, reasons in gathered.filtered.items()}


def check_counts(gathered: Gathered) -> None:
    """Every row that was read is kept, or counted and named once."""
    named = Counter(
        reason.partition(":")[0] if reason.startswith("filter ") else reason for *_, reason in left_out(gathered)
    )
    counted = {f"filter {name}": count for name, count in taken(gathered).items()}
    counted |= {reason: count for reason, (count, _) in gathered.rejected.items()}
    assert named == counted
    assert gathered.read == len(gathered.rows) + named.total()


def texts(gathered: Gathered) -> list[str]:
    return [kept.row["text"] for kept in gathered.rows]


def test_rows_of_several_sources_in_their_order_each_with_its_place_and_weight(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    second = write(tmp_path / "b.jsonl", [{"body": "three"}])
    gathered = gather([Request(second, weight=0.5), Request(first)], "text", [], tmp_path / "rows")
    assert [kept.row for kept in gathered.rows] == [{"text": "three"}, {"text": "one"}, {"text": "two"}]
    assert [(Path(kept.where.source).name, kept.where.line) for kept in gathered.rows] == [
        ("b.jsonl", 1),
        ("a.jsonl", 1),
        ("a.jsonl", 2),
    ]
    assert [kept.weight for kept in gathered.rows] == [0.5, 1.0, 1.0]
    assert gathered.rows.total_weight == 2.5
    assert gathered.rows.weighed(2).total_weight == 5
    assert gathered.formats[second].columns == {"text": "body"}
    assert gathered.formats[second].guessed
    assert gathered.read == 3
    check_counts(gathered)


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    uri = write(
        tmp_path / "a.jsonl", [{"text": "one"}, "{broken", {"text": "  "}, {"text": 5}, {"text": ""}, {"text": "2"}]
    )
    done: list[int] = []
    gathered = gather([Request(uri)], "text", [], tmp_path / "rows", advance=done.append)
    assert texts(gathered) == ["one", "2"]
    assert [(line, reason) for _, line, reason in left_out(gathered)] == [
        (2, "invalid JSON: Expecting property name enclosed in double quotes at column 2"),
        (3, "text is empty"),
        (4, "column `text` is a number, not text"),
        (5, "text is empty"),
    ]
    assert gathered.rejected["text is empty"] == [2, f"{uri}:3"]
    assert sum(done) == gathered.read == 6
    check_counts(gathered)


@pytest.mark.parametrize("bad", [1, 20, 30, 100])
def test_the_format_is_told_by_the_first_good_rows_however_late(tmp_path: Path, bad: int) -> None:
    uri = write(tmp_path / "a.jsonl", ["{broken"] * bad + [{"question": "q", "prompt": "a", "completion": "b"}] * 40)
    gathered = gather([Request(uri)], "chat", [], tmp_path / "rows")
    assert (len(gathered.rows), len(left_out(gathered)), gathered.read) == (40, bad, bad + 40)
    assert next(iter(gathered.rows)).where.line == bad + 1
    assert gathered.formats[uri].name == "prompt_completion"
    check_counts(gathered)


@pytest.mark.parametrize("filters", [[], ["duplicates", "near_duplicates"]])
def test_only_bad_rows_leave_no_row_and_no_format(tmp_path: Path, filters: list[Any]) -> None:
    uri = write(tmp_path / "a.jsonl", ["{broken"] * 25)
    gathered = gather([Request(uri)], "text", filters, tmp_path / "rows")
    assert (list(gathered.rows), gathered.formats, gathered.read) == ([], {}, 25)
    check_counts(gathered)


def test_filters_work_in_order_and_see_the_rows_of_all_sources(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": LONG}, {"text": "x"}, {"text": LONG}])
    second = write(tmp_path / "b.jsonl", [{"text": LONG}, {"text": "x"}, {"text": 7}])
    filters = [{"length": {"min_chars": 5}}, "duplicates"]
    gathered = gather([Request(first), Request(second)], "text", filters, tmp_path / "rows")
    assert texts(gathered) == [LONG]
    assert taken(gathered) == {"length": 2, "duplicates": 2}
    assert sorted(left_out(gathered)) == [
        ("a.jsonl", 2, "filter length: shorter than 5 characters"),
        ("a.jsonl", 3, "filter duplicates: the same as an earlier row"),
        ("b.jsonl", 1, "filter duplicates: the same as an earlier row"),
        ("b.jsonl", 2, "filter length: shorter than 5 characters"),
        ("b.jsonl", 3, "column `text` is a number, not text"),
    ]
    check_counts(gathered)


def test_a_filter_that_compares_rows_stands_between_two_that_do_not(tmp_path: Path) -> None:
    """It compares what the one before it gives, and what the one after it takes out still counts as seen."""
    rows = [{"text": text} for text in ("one  word", "one word", "abc", "two", "abc  ", "two", "one word  ")]
    uri = write(tmp_path / "a.jsonl", rows)
    filters = ["white_space", "duplicates", {"length": {"min_chars": 4}}]
    gathered = gather([Request(uri)], "text", filters, tmp_path / "rows")
    assert [(kept.where.line, kept.row["text"]) for kept in gathered.rows] == [(1, "one word")]
    assert {line for _, line, _ in left_out(gathered)} == {2, 3, 4, 5, 6, 7}
    assert gathered.changed["white_space"].total() == 3
    check_counts(gathered)


def test_what_one_comparison_takes_out_the_next_does_not_see(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(60)]
    near = [*words[:-1], "other"]
    uri = write(tmp_path / "a.jsonl", [{"text": " ".join(each)} for each in (words, words, near, near)])
    gathered = gather([Request(uri)], "text", ["duplicates", "near_duplicates"], tmp_path / "rows")
    assert [kept.where.line for kept in gathered.rows] == [1]
    assert taken(gathered) == {"duplicates": 2, "near_duplicates": 1}
    assert {name: [entry["where"] for entry in shown] for name, shown in gathered.samples.items()} == {
        "duplicates": [f"{uri}:2", f"{uri}:4"],
        "near_duplicates": [f"{uri}:3"],
    }
    check_counts(gathered)


def test_a_comparison_when_no_row_is_left(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", [{"text": "x"}, {"text": "x"}])
    gathered = gather([Request(uri)], "text", ["duplicates", {"length": {"min_chars": 5}}], tmp_path / "rows")
    assert (len(gathered.rows), gathered.read) == (0, 2)
    check_counts(gathered)


def test_what_repeats_data_seen_before_is_taken_out_and_the_seen_is_not_counted(tmp_path: Path) -> None:
    seen = write(tmp_path / "seen.jsonl", [{"text": "old"}, {"text": "old"}, "{broken", {"text": "x"}])
    new = write(tmp_path / "new.jsonl", [{"text": "new"}, {"text": "old"}, {"text": "new"}, {"text": "fresh"}])
    gathered = gather([Request(new)], "text", ["duplicates"], tmp_path / "rows", seen=[Request(seen)])
    assert texts(gathered) == ["new", "fresh"]
    assert (gathered.read, taken(gathered), gathered.rejected) == (4, {"duplicates": 2}, {})
    assert [(name, line) for name, line, _ in left_out(gathered)] == [("new.jsonl", 2), ("new.jsonl", 3)]
    check_counts(gathered)
    alone = gather([Request(new)], "text", ["duplicates"], tmp_path / "others")
    assert texts(alone) == ["new", "old", "fresh"]


def test_a_filter_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def louder(row):\n    return {'text': row['text'] + '!'}\n\n\n"
        "def again(row):\n    return 'too loud' if row['text'] == 'two!' else {'text': row['text'] * 2}\n"
    )
    uri = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    filters = [f"{tmp_path}/mine.py:louder", f"{tmp_path}/mine.py:again"]
    gathered = gather([Request(uri)], "text", filters, tmp_path / "rows")
    assert texts(gathered) == ["one!one!"]
    assert gathered.filtered == {filters[1]: Counter({"too loud": 1})}
    assert left_out(gathered) == [("a.jsonl", 2, f"filter {filters[1]}: too loud")]


def test_a_named_format_and_columns_win(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", [{"text": "t", "code": "c", "doc": "d"}])
    request = Request(uri, format="prompt_completion", columns={"prompt": "code", "completion": "doc"})
    gathered = gather([request], "chat", [], tmp_path / "rows")
    (kept,) = gathered.rows
    assert [message["content"] for message in kept.row["messages"]] == ["c", "d"]
    assert gathered.formats[uri].guessed is None


def test_labels_come_with_the_place_of_their_first_row(tmp_path: Path) -> None:
    rows = [{"text": "t", "label": label} for label in ("x", "y", "x")]
    uri = write(tmp_path / "a.jsonl", rows)
    assert gather([Request(uri)], "labelled", [], tmp_path / "rows").labels == {"x": f"{uri}:1", "y": f"{uri}:2"}


def test_data_of_no_known_format_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", [{"number": 1}])
    with pytest.raises(DataError):
        gather([Request(uri)], "chat", [], tmp_path / "rows")
    with pytest.raises(DataError):
        gather([Request(str(tmp_path / "missing.jsonl"))], "chat", [], tmp_path / "others")


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_a_source_without_rows_is_refused_by_name(tmp_path: Path, content: str) -> None:
    good, empty = write(tmp_path / "a.jsonl", [{"text": "one"}]), tmp_path / "empty.jsonl"
    empty.write_text(content)
    with pytest.raises(DataError, match="no rows") as caught:
        gather([Request(good), Request(str(empty))], "text", [], tmp_path / "rows")
    assert caught.value.where == str(empty)


def test_rows_of_one_group_have_one_place_and_strata_follow_the_column(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "author": "AB"[i % 2], "topic": i % 3} for i in range(12)]
    uri = write(tmp_path / "a.jsonl", rows)
    gathered = gather([Request(uri)], "text", [], tmp_path / "rows", group="author", stratify="topic")
    places, strata = gathered.rows.column("place"), gathered.rows.column("stratum")
    assert len(np.unique(gathered.rows.column("position"))) == 12
    assert len({*places[::2]}) == len({*places[1::2]}) == 1 != len({*places})
    assert [len({*strata[at::3]}) for at in range(3)] == [1, 1, 1]
    assert len({*strata}) == 3


@pytest.mark.usefixtures("short_reads")
def test_the_same_rows_in_the_same_order_however_the_files_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of some lines, with processes, with what compares rows across pieces, and from what is there already."""
    rows = [
        {
            "text": " ".join(f"text{i % 80}word{j}" for j in range(50))
            + ("", "", " more", " far")[i // 80 % 4] * (i // 160 + 1)
        }
        for i in range(320)
    ]
    uris = [write(tmp_path / "a.jsonl", [*rows[::2], "{broken"]), write(tmp_path / "b.jsonl", rows[1::2])]
    filters = ["duplicates", "near_duplicates"]

    def found(name: str, workers: int) -> tuple[Any, ...]:
        gathered = gather([Request(uri) for uri in uris], "text", filters, tmp_path / name, workers=workers)
        check_counts(gathered)
        kept = [(kept.row, kept.where) for kept in gathered.rows]
        return kept, sorted(left_out(gathered)), gathered.filtered, gathered.rejected, gathered.samples

    whole = found("whole", 1)
    assert len({where.source for _, where in whole[0]}) == 2
    assert set(whole[2]) == {*filters}
    cut = pieces.pieces_of
    monkeypatch.setattr(module, "pieces_of", lambda *source: cut(*source, piece_bytes=9000))
    monkeypatch.setattr(module, "_BYTES_FOR_PROCESSES", 0)
    assert len(cut(uris[0], piece_bytes=9000)) > 10
    assert found("in pieces", 1) == whole
    assert found("processes", 2) == whole
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "processes").glob("*-*/*")}
    assert found("processes", 2) == whole
    assert {path: path.stat().st_mtime_ns for path in before} == before
