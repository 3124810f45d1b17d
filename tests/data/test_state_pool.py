"""States that one corpus had computed are found by another that holds the same examples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llmkit.data.corpus import Column, Corpus, CorpusWriter
from llmkit.data.state_pool import PooledStates, StatePool, example_digests, save_examples
from llmkit.data.states import States, StatesWriter, join_parts

COLUMNS = {"input_ids": Column("uint16"), "supervised": Column("bool"), "source": Column("uint16", ragged=False)}


def corpus_of(folder: Path, examples: Iterable[int], source: int = 0, answer: int = 1) -> Corpus:
    writer = CorpusWriter(folder, COLUMNS)
    for number in examples:
        ids = np.arange(number, number + 2 + number % 3)
        supervised = np.arange(len(ids)) >= answer
        writer.add({"input_ids": ids, "supervised": supervised, "source": source})
    return writer.finish({})


def states_of(number: int) -> np.ndarray:
    return np.full((2 + number % 3, 4), number, np.float32)


def keep(cache: Path, name: str, corpus: Corpus, examples: list[int], created: int, written: list[int]) -> None:
    folder = cache / name
    writer = StatesWriter(folder, 0, len(corpus))
    for place in written:
        writer.add(place, states_of(examples[place]), "float32")
    writer.close()
    meta = {"prefix": "p", "created": created}
    digests = save_examples(folder, example_digests(corpus), np.array(written))
    join_parts(folder, 1, meta | {"examples": digests})


def pooled(cache: Path, corpus: Corpus, prefix: str = "p") -> PooledStates:
    folders, where = StatePool(cache, prefix).choose(example_digests(corpus))
    return PooledStates([States(folder) for folder in folders], where)


def test_examples_are_told_apart_by_all_but_their_source(tmp_path: Path) -> None:
    first = example_digests(corpus_of(tmp_path / "a", range(6)))
    assert len({row.tobytes() for row in first}) == 6
    assert np.array_equal(first, example_digests(corpus_of(tmp_path / "b", range(6), source=3)))
    other = example_digests(corpus_of(tmp_path / "c", range(6), answer=0))
    assert not (first == other).all(axis=1).any(), "what is supervised decides how much of an example is computed"


def test_states_are_gathered_from_several_folders(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    numbers = [[5, 6, 7, 8], [8, 9, 10]]
    for name, own in zip("ab", numbers, strict=True):
        keep(cache, name, corpus_of(tmp_path / name, own), own, created=ord(name), written=list(range(len(own))))
    wanted = [10, 6, 8, 99, 6]
    found = pooled(cache, corpus_of(tmp_path / "wanted", wanted))
    assert not found.complete
    assert [found.has(place) for place in range(5)] == [True, True, True, False, True]
    for place in (0, 1, 2, 4):
        assert np.array_equal(found[place], states_of(wanted[place]))
    assert pooled(cache, corpus_of(tmp_path / "all", [7, 9])).complete


def test_what_is_added_later_changes_nothing_for_what_there_is(tmp_path: Path) -> None:
    cache, corpus = tmp_path / "cache", corpus_of(tmp_path / "corpus", range(4))
    keep(cache, "z", corpus, list(range(4)), created=1, written=[0, 1])
    before = StatePool(cache, "p").choose(example_digests(corpus))
    keep(cache, "a", corpus, list(range(4)), created=2, written=[0, 1, 2])
    folders, where = StatePool(cache, "p").choose(example_digests(corpus))
    assert before[0] == [cache / "z"]
    assert folders == [cache / "z", cache / "a"]
    assert where.tolist() == [[0, 0], [0, 1], [1, 2], [-1, -1]]


def test_other_prefixes_and_damaged_lists_are_left_out(tmp_path: Path) -> None:
    cache, corpus = tmp_path / "cache", corpus_of(tmp_path / "corpus", range(4))
    keep(cache, "a", corpus, list(range(4)), created=1, written=[0, 1, 2, 3])
    digests = example_digests(corpus)
    assert StatePool(cache, "another").choose(digests)[0] == []
    assert StatePool(tmp_path / "nothing", "p").choose(digests)[0] == []
    assert StatePool(cache, "p").without([cache / "a"]).choose(digests)[0] == []
    (cache / "a" / "examples.npy").write_bytes(b"damaged")
    assert StatePool(cache, "p").choose(digests)[0] == []
