"""A corpus gives back what was written, names its content, and notices damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmkit.data.corpus import Column, Corpus, CorpusWriter, smallest_unsigned
from llmkit.errors import ArtifactError

COLUMNS = {
    "input_ids": Column("uint16"),
    "supervised": Column("bool"),
    "label": Column("uint8", ragged=False),
    "text_bytes": Column("int64", ragged=False),
}
EXAMPLES: list[dict[str, Any]] = [
    {"input_ids": [1, 2, 3], "supervised": [False, True, True], "label": 2, "text_bytes": 7},
    {"input_ids": [], "supervised": [], "label": 0, "text_bytes": 0},
    {"input_ids": [65535], "supervised": [True], "label": 255, "text_bytes": 1 << 40},
    {"input_ids": [], "supervised": [], "label": 1, "text_bytes": 2},
]


def write(folder: Path, examples: list[dict[str, Any]] = EXAMPLES, **meta: Any) -> Corpus:
    writer = CorpusWriter(folder, COLUMNS)
    for example in examples:
        writer.add(example)
    return writer.finish(meta)


def plain(example: dict[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in example.items()}


def test_gives_back_what_was_written(tmp_path: Path) -> None:
    write(tmp_path, counts=3)
    corpus = Corpus(tmp_path)
    assert len(corpus) == 4
    assert [plain(example) for example in corpus] == EXAMPLES
    assert [plain(corpus[i]) for i in range(4)] == EXAMPLES
    assert corpus.lengths("input_ids").tolist() == [3, 0, 1, 0]
    assert corpus.values("label").tolist() == [2, 0, 255, 1]
    assert corpus.meta == {"counts": 3}
    assert corpus[0]["input_ids"].dtype == np.uint16


@pytest.mark.parametrize("examples", [[], [EXAMPLES[1]], [EXAMPLES[1]] * 3])
def test_a_corpus_without_a_single_value(tmp_path: Path, examples: list[dict[str, Any]]) -> None:
    write(tmp_path, examples)
    assert [plain(example) for example in Corpus(tmp_path)] == examples


@pytest.mark.parametrize("index", [4, -1, 1000])
def test_an_index_out_of_range(tmp_path: Path, index: int) -> None:
    corpus = write(tmp_path)
    with pytest.raises(IndexError, match="of a corpus of 4"):
        corpus[index]


def test_a_value_that_does_not_fit_is_an_error_and_not_another_value(tmp_path: Path) -> None:
    writer = CorpusWriter(tmp_path, COLUMNS)
    with pytest.raises(OverflowError):
        writer.add(EXAMPLES[0] | {"input_ids": [65536]})
    with pytest.raises(OverflowError):
        writer.add(EXAMPLES[0] | {"label": 256})


def test_the_same_input_gives_the_same_bytes_and_content(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", identity={"x": 1}), write(tmp_path / "b", identity={"x": 1})
    names = sorted(path.name for path in first.folder.iterdir())
    assert names == sorted(path.name for path in second.folder.iterdir())
    for name in names:
        assert (first.folder / name).read_bytes() == (second.folder / name).read_bytes()
    assert first.content == second.content


def test_the_content_depends_on_values_order_boundaries_and_identity_alone(tmp_path: Path) -> None:
    moved = [EXAMPLES[0] | {"input_ids": [1, 2]}, EXAMPLES[1] | {"input_ids": [3]}, *EXAMPLES[2:]]
    contents = [
        write(tmp_path / "a", identity={"x": 1}).content,
        write(tmp_path / "b", identity={"x": 2}).content,
        write(tmp_path / "c", EXAMPLES[::-1], identity={"x": 1}).content,
        write(tmp_path / "d", moved, identity={"x": 1}).content,
        write(tmp_path / "e", EXAMPLES[:3], identity={"x": 1}).content,
    ]
    assert len(set(contents)) == 5
    assert write(tmp_path / "f", identity={"x": 1}, counts=9).content == contents[0]


def test_writing_again_leaves_nothing_of_the_old_corpus(tmp_path: Path) -> None:
    fresh = write(tmp_path / "fresh").content
    write(tmp_path / "again", EXAMPLES * 5)
    (tmp_path / "again" / "gone.bin").write_bytes(b"of a column that is no more")
    assert write(tmp_path / "again").content == fresh
    CorpusWriter(tmp_path / "again", COLUMNS)  # killed before it finished
    with pytest.raises(ArtifactError):
        Corpus(tmp_path / "again")


@pytest.mark.parametrize("name", ["input_ids.bin", "input_ids.offsets.bin", "label.bin", "supervised.offsets.bin"])
def test_a_file_of_another_size_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    data = (tmp_path / name).read_bytes()
    for damaged in (data[:-1], data + b"\0"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ArtifactError) as caught:
            Corpus(tmp_path)
        assert str(tmp_path / name) in str(caught.value.where)
        assert caught.value.hint == "run preprocess again"
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match="missing or damaged"):
        Corpus(tmp_path)


def test_another_format_and_a_missing_manifest(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))
    with pytest.raises(ArtifactError, match="another llmkit"):
        Corpus(tmp_path)
    path.unlink()
    with pytest.raises(ArtifactError):
        Corpus(tmp_path)


@pytest.mark.parametrize(
    ("largest", "dtype"),
    [(0, "uint8"), (255, "uint8"), (256, "uint16"), (65535, "uint16"), (65536, "uint32"), (1 << 32, "uint64")],
)
def test_the_smallest_type_that_holds_a_value(largest: int, dtype: str) -> None:
    assert smallest_unsigned(largest) == dtype
    assert int(np.array([largest], dtype)[0]) == largest
