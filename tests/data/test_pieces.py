"""Sources in pieces: put one after the other they are what the whole source gives, wherever it was cut."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from llmkit.data.pieces import Piece, pieces_of, stored_bytes
from llmkit.data.readers import Rejected, Row
from llmkit.data.sources import read_rows
from llmkit.data.storage import DataFile
from llmkit.errors import DataError


class _ShortReads(io.BufferedReader):
    """A file that gives few bytes at a time, as files may, so that small ones can be cut."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size, 100) if size and size > 0 else size)


@pytest.fixture
def short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of some hundred bytes, which are else a megabyte or more."""
    opened: Callable[[DataFile], io.BufferedReader] = DataFile.open_stored
    monkeypatch.setattr(DataFile, "open_stored", lambda file: _ShortReads(opened(file).detach()))


def rows_of(pieces: list[Piece]) -> list[Row | Rejected]:
    return list(chain.from_iterable(piece.rows() for piece in pieces))


def good_line(chance: random.Random, number: int) -> bytes:
    text = "".join(chance.choices("aé漢🙂 \u2028\x85", k=chance.choice((1, 5, 40, 3000))))
    return json.dumps({"n": number, "text": text}, ensure_ascii=chance.random() < 0.3).encode()


def lines_of(chance: random.Random, count: int) -> list[bytes]:
    """Rows whose `n` is their line, and lines that are blank or broken."""
    odd = (b"", b"  \t", b"{broken", b'{"text": "\xff\xfe"}', b"[1]", b"\xef\xbb\xbf", b"\xe6\xbc")
    return [chance.choice(odd) if chance.random() < 0.3 else good_line(chance, at) for at in range(1, count + 1)]


SIZES = (1, 150, 400, 1000, 5000, 20_000, 1 << 24)


@pytest.mark.usefixtures("short_reads")
@pytest.mark.parametrize("piece_bytes", SIZES)
@pytest.mark.parametrize("last", [b"", b"\n", b"\r\n\r\n\n"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_cut_anywhere_the_rows_and_their_lines_are_the_same(
    tmp_path: Path, piece_bytes: int, last: bytes, newline: bytes
) -> None:
    file = tmp_path / "rows.jsonl"
    for seed in range(6):
        file.write_bytes(newline.join(lines_of(random.Random(seed), 80)) + last)
        pieces = pieces_of(str(file), piece_bytes=piece_bytes)
        found = rows_of(pieces)
        assert found == list(read_rows(str(file)))
        assert [row.where.line for row in found if isinstance(row, Row)] == [
            row.values["n"] for row in found if isinstance(row, Row)
        ]
        assert stored_bytes(pieces) == file.stat().st_size
        if piece_bytes <= 1000:
            assert len(pieces) > 5


@pytest.mark.usefixtures("short_reads")
def test_a_line_that_starts_as_utf16_does_is_one_bad_row_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([b'{"text": "abc"}', b"\xff\xfe{}"] * 200))
    found = rows_of(pieces_of(str(file), piece_bytes=300))
    assert found == list(read_rows(str(file)))
    assert sum(isinstance(row, Rejected) for row in found) == 200


@pytest.mark.usefixtures("short_reads")
def test_lines_longer_than_a_piece_or_than_a_row_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.data.readers.LONGEST_ROW_BYTES", 10_000)
    file = tmp_path / "rows.jsonl"
    texts = ["a", "b" * 9000, "c" * 50_000, "d", "e" * 200_000]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = rows_of(pieces_of(str(file), piece_bytes=2000))
    assert found == list(read_rows(str(file)))
    assert [(isinstance(row, Row), row.where.line) for row in found] == [
        (True, 1),
        (True, 2),
        (False, 3),
        (True, 4),
        (False, 5),
    ]


@pytest.mark.usefixtures("short_reads")
def test_pieces_can_be_read_apart_in_any_order_and_by_any_process(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines_of(random.Random(9), 120)))
    pieces = pieces_of(str(file), piece_bytes=300)
    alone = {at: list(pickle.loads(pickle.dumps(pieces[at])).rows()) for at in reversed(range(len(pieces)))}
    assert [row for at in range(len(pieces)) for row in alone[at]] == list(read_rows(str(file)))


def test_what_is_appended_after_the_cut_is_in_no_piece(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "a" * 1000}) + "\n" * 5 + (json.dumps({"text": "b" * 1000}) + "\n") * 3000)
    pieces = pieces_of(str(file), piece_bytes=1 << 20)
    with file.open("a") as more:
        more.write('{"text": "late"}\n')
    found = rows_of(pieces)
    assert len(pieces) > 1
    assert len(found) == 3001
    assert found[-1].where.line == 3005


@pytest.mark.usefixtures("short_reads")
def test_small_files_are_put_together_and_large_ones_cut_between_them(tmp_path: Path) -> None:
    sizes = [1, 1, 2, 60, 1, 1, 55, 1]
    for at, size in enumerate(sizes):
        (tmp_path / f"{at}.jsonl").write_text("".join(f'{{"text": "{at} {i}"}}\n' for i in range(size)))
    pieces = pieces_of(str(tmp_path), piece_bytes=500)
    names = [[Path(file.name).stem for file in piece.files] for piece in pieces]
    large = [each for each in names if each in (["3"], ["6"])]
    assert [each for each in names if each not in large] == [["0", "1", "2"], ["4", "5"], ["7"]]
    assert names == [["0", "1", "2"], *[["3"]] * large.count(["3"]), ["4", "5"], *[["6"]] * large.count(["6"]), ["7"]]
    assert min(large.count(["3"]), large.count(["6"])) > 1
    assert rows_of(pieces) == list(read_rows(str(tmp_path)))


def test_many_small_files_make_few_pieces(tmp_path: Path) -> None:
    for at in range(50):
        (tmp_path / f"{at:02}.txt").write_text(f"document {at}\n")
    pieces = pieces_of(str(tmp_path), piece_bytes=100)
    assert len(pieces) == 6  # ten of 11 bytes, four times nine of 12, and the rest
    assert rows_of(pieces) == list(read_rows(str(tmp_path)))
    assert len(pieces_of(str(tmp_path))) == 1


@pytest.mark.usefixtures("short_reads")
@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.json"])
def test_what_cannot_be_cut_at_lines_is_one_piece(tmp_path: Path, name: str) -> None:
    contents = {
        "rows.jsonl.gz": gzip.compress(
            b"".join(json.dumps({"text": f"{i} {i * i}"}).encode() + b"\n" for i in range(900))
        ),
        "rows.csv": b"text,label\n" + b'"two\nlines",x\n' * 200,
        "rows.json": json.dumps([{"text": str(i)} for i in range(200)]).encode(),
    }
    file = tmp_path / name
    file.write_bytes(contents[name])
    assert file.stat().st_size > 2000
    (piece,) = pieces_of(str(file), piece_bytes=300)
    assert list(piece.rows()) == list(read_rows(str(file)))


@pytest.mark.parametrize("piece_bytes", [1, 20, 1000])
def test_an_empty_file_among_others_is_named(tmp_path: Path, piece_bytes: int) -> None:
    for name, text in (("a", '{"text": "x"}\n'), ("b", ""), ("c", "\n\n"), ("d", '{"text": "y"}')):
        (tmp_path / f"{name}.jsonl").write_text(text)
    found = rows_of(pieces_of(str(tmp_path), piece_bytes=piece_bytes))
    assert found == list(read_rows(str(tmp_path)))
    named = [Path(row.where.source).name for row in found if isinstance(row, Rejected)]
    assert named == ["b.jsonl", "c.jsonl"]


@pytest.mark.usefixtures("short_reads")
def test_a_blank_file_that_is_large_enough_to_be_cut_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "b.jsonl").write_text("\n" * 5000)
    assert rows_of(pieces_of(str(tmp_path), piece_bytes=300)) == list(read_rows(str(tmp_path)))


def test_an_empty_file_alone_has_no_rows_and_a_source_without_files_is_one_piece(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    assert rows_of(pieces_of(str(tmp_path / "a.jsonl"))) == []
    (piece,) = pieces_of("builtin:python-docs", piece_bytes=1)
    assert (piece.files, stored_bytes([piece])) == ((), 0)
    assert next(piece.rows()) == next(read_rows("builtin:python-docs"))


def test_a_source_that_is_missing_is_refused_at_once_and_one_that_went_away_when_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match="missing"):
        pieces_of(str(file))
    file.write_text('{"text": "x"}\n')
    (piece,) = pieces_of(str(file))
    file.unlink()
    with pytest.raises(DataError) as caught:
        list(piece.rows())
    assert str(file) in str(caught.value.where)
