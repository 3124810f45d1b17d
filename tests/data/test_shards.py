"""Row shards: made once from a piece, whatever happened before, and refused when they are damaged."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.data import shards
from llmkit.data.filters import build_filters
from llmkit.data.pieces import Piece, pieces_of
from llmkit.data.rows import RowFormat
from llmkit.data.shards import Cleaning, CleaningTask, RowShard, clean
from llmkit.data.split import position
from llmkit.errors import ArtifactError

TEXT = RowFormat("text", {"text": "text"}, None)
LABELLED = RowFormat("text_label", {"text": "text", "label": "label"}, None)
ROWS: list[Any] = [
    {"text": "one é漢🙂"},
    "{broken",
    {"text": "x"},
    {"text": " "},
    {"text": "two\nlines"},
    {"text": "three"},
]


def task_of(folder: Path, rows: list[Any], *filters: Any, fmt: RowFormat = TEXT, **more: Any) -> CleaningTask:
    """Some rows in a file, and a folder for their shard."""
    file = folder / "rows.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    (piece,) = pieces_of(str(file))
    return CleaningTask(piece, Cleaning("text", fmt, filters, **more), folder / "work" / "000-00000", 0)


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in tree(folder).items()}


class Killed(BaseException):
    """Where a process would have been killed."""


def test_a_shard_has_the_rows_their_places_and_what_was_left_out(tmp_path: Path) -> None:
    task = task_of(tmp_path, ROWS, {"length": {"min_chars": 3}}, weight=0.5)
    shard = RowShard(clean(task))
    file = str(tmp_path / "rows.jsonl")
    assert list(shard.rows(np.arange(len(shard)))) == [ROWS[0], ROWS[4], ROWS[5]]
    assert [str(shard.where(number)) for number in range(len(shard))] == [f"{file}:1", f"{file}:5", f"{file}:6"]
    assert shard.weight == 0.5
    assert (shard.facts["read"], shard.facts["uri"]) == (6, file)
    assert shard.facts["filtered"] == {"length": {"shorter than 3 characters": 1}}
    assert shard.facts["rejected"].keys() == {
        "invalid JSON: Expecting property name enclosed in double quotes at column 2",
        "text is empty",
    }
    left_out = [json.loads(line) for line in shard.tally.left_out[0].read_text().splitlines()]
    assert [entry["line"] for entry in left_out] == [2, 3, 4]
    assert left_out[1] == {"source": file, "line": 3, "reason": "filter length: shorter than 3 characters"}


def test_the_index_says_where_each_row_lies_and_how_it_is_split(tmp_path: Path) -> None:
    rows = [
        {"text": "one é漢🙂", "author": "A", "topic": 1},
        {"text": "  ONE é漢🙂 ", "author": "a ", "topic": 2},
        {"text": "two", "author": "B", "topic": 1},
        {"text": "three", "topic": "1"},
        {"text": "four"},
    ]
    shard = RowShard(clean(task_of(tmp_path, rows, group="author", stratify="topic")))
    index = shard.index
    raw = (shard.folder / "rows.jsonl").read_bytes()
    for number, row in enumerate(rows):
        line = raw[index["offset"][number] :].partition(b"\n")[0]
        assert json.loads(line) == {"text": row["text"]}
        assert shard.row_bytes[number] == len(line) + 1
        assert index["position"][number] == position({"text": row["text"]})
    assert list(index["line"]) == [1, 2, 3, 4, 5]
    assert index["position"][0] == index["position"][1], "case and white space do not count"
    place, stratum = list(index["place"]), list(index["stratum"])
    assert place[0] == place[1] != place[2]
    assert place[3] != place[4], "a row without an author is a group of its own"
    assert stratum[0] == stratum[2]
    assert len({stratum[0], stratum[1], stratum[3], stratum[4]}) == 4, "1 and '1' are not the same, nor is nothing"


def test_without_group_and_strata_a_rows_place_is_its_position(tmp_path: Path) -> None:
    shard = RowShard(clean(task_of(tmp_path, ROWS)))
    assert list(shard.index["place"]) == list(shard.index["position"])
    assert set(shard.index["stratum"]) == {0}


def test_a_column_of_the_canonical_row_may_divide_too(tmp_path: Path) -> None:
    """`label` is what the row format calls it, whatever its name in the data."""
    fmt = RowFormat("text_label", {"text": "text", "label": "class"}, None)
    rows = [{"text": f"t{i}", "class": i % 2} for i in range(6)]
    shard = RowShard(clean(task_of(tmp_path, rows, fmt=fmt, stratify="label")))
    assert [len(set(shard.index["stratum"][at::2])) for at in range(2)] == [1, 1]
    assert len(set(shard.index["stratum"])) == 2
    assert shard.facts["labels"] == {"0": f"{tmp_path}/rows.jsonl:1", "1": f"{tmp_path}/rows.jsonl:2"}


def test_some_rows_are_read_without_the_others(tmp_path: Path) -> None:
    rows = [{"text": f"text {i} " * (i % 5 + 1)} for i in range(50)]
    shard = RowShard(clean(task_of(tmp_path, rows)))
    for numbers in ([], [0], [49], [3, 4, 30], list(range(1, 50, 2))):
        assert list(shard.rows(np.array(numbers, int))) == [rows[number] for number in numbers]


def test_rows_of_several_files_name_their_own(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "x"}\n\n{"text": "y"}\n')
    (piece,) = pieces_of(str(tmp_path))
    shard = RowShard(clean(CleaningTask(piece, Cleaning("text", TEXT, ()), tmp_path / "work" / "0", 0)))
    places = [shard.where(number) for number in range(len(shard))]
    assert [(Path(where.source).name, where.line) for where in places] == [
        ("a.jsonl", 1),
        ("a.jsonl", 3),
        ("b.jsonl", 1),
        ("b.jsonl", 3),
    ]


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    task = task_of(tmp_path, ROWS, "duplicates")
    folder = clean(task)
    before = tree(folder)
    (tmp_path / "rows.jsonl").unlink()
    assert clean(task) == folder
    assert tree(folder) == before


def test_the_same_piece_gives_the_same_bytes(tmp_path: Path) -> None:
    task = task_of(tmp_path, ROWS * 20, {"length": {"min_chars": 3}}, "duplicates", "near_duplicates", group="text")
    one, other = clean(task), clean(replace(task, folder=tmp_path / "other"))
    assert contents(one) == contents(other)


@pytest.mark.parametrize("killed_at", range(5))
def test_killed_at_any_row_it_begins_the_shard_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    task = task_of(tmp_path, ROWS, "duplicates")
    rows = Piece.rows

    def some(piece: Piece) -> Iterator[Any]:
        for number, row in enumerate(rows(piece)):
            if number == killed_at:
                raise Killed
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(Piece, "rows", some)
        with pytest.raises(Killed):
            clean(task)
    assert not task.folder.exists()
    whole = replace(task, folder=tmp_path / "whole")
    assert contents(clean(task)) == contents(clean(whole))
    assert [path.name for path in task.folder.parent.iterdir()] == [task.folder.name], "nothing lies aside"


def test_killed_between_the_rows_and_the_name_it_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a file of another try in the folder aside."""
    task = task_of(tmp_path, ROWS, "duplicates")

    def killed(path: Path, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            clean(task)
    (aside,) = task.folder.parent.iterdir()
    (aside / "keys-7.npy").write_bytes(b"of another try")
    assert not task.folder.exists()
    assert "keys-7.npy" not in contents(clean(task))
    assert len(RowShard(task.folder)) == 4


@pytest.mark.parametrize("name", ["rows.jsonl", "index.npy", "left_out.jsonl", "keys-0.npy", "rows-of-keys-0.npy"])
@pytest.mark.parametrize("damage", ["gone", "cut", "longer"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    file = clean(task_of(tmp_path, ROWS, "duplicates")) / name
    content = file.read_bytes()
    file.write_bytes({"gone": b"", "cut": content[:-1], "longer": content + b"\n"}[damage])
    if damage == "gone":
        file.unlink()
    with pytest.raises(ArtifactError) as caught:
        RowShard(file.parent)
    assert str(file) in str(caught.value.got)
    assert "--no-resume" in str(caught.value.hint)


def test_a_shard_without_its_facts_is_an_error_of_the_artifact(tmp_path: Path) -> None:
    folder = clean(task_of(tmp_path, ROWS))
    (folder / "shard.json").write_text("{")
    with pytest.raises(ArtifactError):
        RowShard(folder)


def test_a_shard_is_sent_to_a_process_by_its_folder(tmp_path: Path) -> None:
    shard = RowShard(clean(task_of(tmp_path, [{"text": "x" * 100}] * 2000)))
    sent = pickle.dumps(shard)
    assert len(sent) < 1000
    assert list(pickle.loads(sent).rows(np.arange(2000))) == list(shard.rows(np.arange(2000)))


def test_the_keys_of_each_filter_that_compares_and_the_rows_that_they_are_of(tmp_path: Path) -> None:
    """Also of rows that a later filter took out, which earlier ones have seen."""
    rows = [{"text": text} for text in ("ab", "a", "abc", "abcdef", "abcd")]
    filters = ({"length": {"min_chars": 2}}, "duplicates", {"length": {"max_chars": 4}}, "near_duplicates")
    shard = RowShard(clean(task_of(tmp_path, rows, *filters)))
    keys, numbers = shard.keys(1)
    assert (keys.shape, keys.dtype, list(numbers)) == ((4, 2), np.uint64, [0, 1, -1, 2])
    assert len(np.unique(keys, axis=0)) == 4
    keys, numbers = shard.keys(3)
    assert (keys.shape, keys.dtype, list(numbers)) == ((3, 128), np.uint32, [0, 1, 2])
    assert sorted(path.name for path in shard.folder.glob("keys-*")) == ["keys-1.npy", "keys-3.npy"]


def test_a_shard_without_rows_has_no_keys_and_no_index(tmp_path: Path) -> None:
    shard = RowShard(clean(task_of(tmp_path, ["{broken"], "duplicates", "near_duplicates", group="x")))
    assert (len(shard), shard.index["place"].shape) == (0, (0,))
    assert [shard.keys(at)[0].shape for at in (0, 1)] == [(0, 2), (0, 128)]
    assert list(shard.rows(np.zeros(0, int))) == []
    assert shard.facts["read"] == 1


MASKS = """
class Masks:
    secret = True

    def __call__(self, row):
        return "two numbers" if row["text"].count("4111") > 1 else {"text": row["text"].replace("4111", "[NUMBER]")}
"""


def test_rows_taken_out_before_their_secrets_were_masked_are_not_shown(tmp_path: Path) -> None:
    """Nor those that the filter which looks for secrets took out itself."""
    own = f"{tmp_path}/own.py:Masks"
    (tmp_path / "own.py").write_text(MASKS)
    filters = ({"length": {"min_chars": 5}}, own, {"length": {"max_chars": 40}}, "duplicates")
    secret = "the number is 4111 and more text"
    rows = [{"text": text} for text in ("4111", secret, "4111 4111 4111", f"{secret} and on and on", "fine and short")]
    shard = RowShard(clean(task_of(tmp_path, rows, *filters)))
    assert shard.facts["filtered"] == {
        "length": {"shorter than 5 characters": 1, "longer than 40 characters": 1},
        own: {"two numbers": 1},
    }
    (shown,) = shard.facts["samples"]["length"]
    assert shown["reason"] == "longer than 40 characters"
    assert own not in shard.facts["samples"]
    assert all(b"4111" not in content for content in contents(shard.folder).values())
    kept = [row["text"] for row in shard.rows(np.arange(2))]
    assert kept == [secret.replace("4111", "[NUMBER]"), "fine and short"]


def test_samples_are_few_short_and_say_where(tmp_path: Path) -> None:
    rows = [{"text": "long " * 1000 + str(i)} for i in range(30)]
    shown = RowShard(clean(task_of(tmp_path, rows, {"length": {"max_chars": 10}}))).facts["samples"]["length"]
    assert len(shown) == shards.SAMPLES == 20
    assert shown[2]["where"] == f"{tmp_path}/rows.jsonl:3"
    assert {entry["reason"] for entry in shown} == {"longer than 10 characters"}
    assert max(len(entry["text"]) for entry in shown) <= 300


def test_filters_that_are_used_again_count_each_piece_by_itself(tmp_path: Path) -> None:
    filters = build_filters(["white_space"])
    tasks = []
    for count in (3, 1):
        folder = tmp_path / str(count)
        folder.mkdir()
        tasks.append(task_of(folder, [{"text": "two  blanks"}] * count, "white_space"))
    again = [RowShard(clean(task, filters)).facts["changed"] for task in tasks]
    assert again == [{"white_space": {"texts": 3}}, {"white_space": {"texts": 1}}]
