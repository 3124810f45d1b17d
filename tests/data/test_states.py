"""Hidden states on disk: what was written is what is read, damage is found, and what was used longest ago goes first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from llmkit.data.corpus import Column, Corpus, CorpusWriter
from llmkit.data.states import STATES, CorpusWithStates, States, StatesWriter, join_parts, make_room
from llmkit.errors import ArtifactError

WIDTH = 6
LENGTHS = (3, 1, 7, 2, 5, 4)


def states_of(number: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(LENGTHS[number], WIDTH, generator=generator).to(dtype)


def as_array(states: torch.Tensor) -> np.ndarray:
    return (states.view(torch.int16) if states.dtype == torch.bfloat16 else states).numpy()


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(array)).view(dtype)


def write(folder: Path, *parts: Iterable[int], dtype: torch.dtype = torch.float32) -> Path:
    """Parts of these examples, in the order given."""
    for part, numbers in enumerate(parts):
        writer = StatesWriter(folder, part, len(LENGTHS))
        for number in numbers:
            writer.add(number, as_array(states_of(number, dtype)), str(dtype).removeprefix("torch."))
        writer.close()
    join_parts(folder, len(parts), {"key": folder.name})
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    writer = CorpusWriter(tmp_path / "corpus", {"input_ids": Column("uint8")})
    for length in LENGTHS:
        writer.add({"input_ids": np.arange(length)})
    return writer.finish({})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "parts", [[[4, 0, 2, 5, 1, 3]], [[0, 2, 4], [5, 3, 1]], [[1], [], [5, 4, 3, 2, 0]]], ids=["one", "two", "one empty"]
)
def test_what_is_read_is_what_was_written(parts: list[list[int]], dtype: torch.dtype, tmp_path: Path) -> None:
    found = States(write(tmp_path / "states", *parts, dtype=dtype))
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.complete
    assert found.meta == {"key": "states"}
    assert found.bytes == sum(LENGTHS) * WIDTH * dtype.itemsize
    for number, length in enumerate(LENGTHS):
        assert found.has(number)
        assert found[number].shape == (length, WIDTH)
        assert torch.equal(as_tensor(found[number], dtype), states_of(number, dtype))


def test_only_what_is_needed_stays_on_disk(tmp_path: Path) -> None:
    folder = write(tmp_path / "states", [0, 1], [2])
    names = {path.name for path in folder.iterdir()}
    assert names == {"states.json", "index.npy", "part-00000.bin", "part-00001.bin"}


def test_numbers_that_are_none_come_back_with_the_same_bits(tmp_path: Path) -> None:
    odd = np.array([[np.nan, np.inf, -np.inf, -0.0, 1e-45, 3.4e38]], np.float32)
    writer = StatesWriter(tmp_path / "states", 0, 1)
    writer.add(0, odd, "float32")
    writer.close()
    join_parts(tmp_path / "states", 1, {})
    assert States(tmp_path / "states")[0].tobytes() == odd.tobytes()


def test_rows_of_a_larger_array_are_written_as_they_are_seen(tmp_path: Path) -> None:
    whole = torch.randn(10, 2 * WIDTH).numpy()
    writer = StatesWriter(tmp_path / "states", 0, 1)
    writer.add(0, whole[[7, 2, 5], ::2], "float32")
    writer.close()
    join_parts(tmp_path / "states", 1, {})
    assert np.array_equal(States(tmp_path / "states")[0], whole[[7, 2, 5], ::2])


def test_examples_may_be_absent(tmp_path: Path, corpus: Corpus) -> None:
    found = States(write(tmp_path / "states", [4], [0, 3]))
    assert [found.has(number) for number in range(6)] == [True, False, False, True, True, False]
    assert not found.complete
    known = CorpusWithStates(corpus, {2: found})
    assert [STATES in known[number] for number in range(6)] == [True, False, False, True, True, False]
    assert known.apart([5, 4, 3, 2, 1, 0]) == [[4, 3, 0], [5, 2, 1]]


def test_a_corpus_with_states_is_the_corpus_and_more(tmp_path: Path, corpus: Corpus) -> None:
    known = CorpusWithStates(corpus, {2: States(write(tmp_path / "states", range(6), dtype=torch.bfloat16))})
    assert len(known) == len(corpus)
    assert known.folder == corpus.folder
    assert np.array_equal(known.lengths("input_ids"), LENGTHS)
    assert known.apart([3, 1, 2]) == [[3, 1, 2]], "all are known: nothing is to be kept apart"
    for number in range(6):
        array, dtype, depth = known[number][STATES]
        assert (dtype, depth) == ("bfloat16", 2)
        assert torch.equal(as_tensor(array, torch.bfloat16), states_of(number, torch.bfloat16))
        assert np.array_equal(known[number]["input_ids"], corpus[number]["input_ids"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a bit": flip,
    "cut by a byte": cut,
    "a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("name", ["part-00000.bin", "part-00001.bin", "index.npy"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found_and_named(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    folder = write(tmp_path / "states", [0, 1, 2], [3, 4, 5])
    damage(folder / name)
    with pytest.raises(ArtifactError) as caught:
        States(folder)
    assert Path(str(caught.value.where)) == folder / name


@pytest.mark.parametrize("damage", ["cut by a byte", "empty", "gone"])
def test_a_manifest_that_cannot_be_read_is_found(damage: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "states", range(6))
    manifest = folder / "states.json"
    manifest.write_text(manifest.read_text().rstrip())
    DAMAGES[damage](manifest)
    with pytest.raises(ArtifactError):
        States(folder)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    folder = write(tmp_path / "states", range(6))
    manifest = folder / "states.json"
    whole, missed = manifest.read_bytes(), []
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = States(folder)
        except ArtifactError:
            continue
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            missed.append((place, whole[max(0, place - 8) : place + 1], repr(error)))
            continue
        same = found[2].shape == (7, WIDTH) and np.array_equal(found[2], states_of(2, torch.float32).numpy())
        if not same and found.meta == {"key": "states"}:  # another key is for those to see who look for it
            missed.append((place, whole[max(0, place - 8) : place + 1], "wrong states"))
    assert not missed


def test_states_of_another_format_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "states", range(6))
    manifest = json.loads((folder / "states.json").read_text())
    (folder / "states.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ArtifactError, match="another llmkit"):
        States(folder)


def test_what_was_never_finished_holds_no_states(tmp_path: Path) -> None:
    writer = StatesWriter(tmp_path / "states", 0, len(LENGTHS))
    writer.add(0, as_array(states_of(0, torch.float32)), "float32")
    with pytest.raises(ArtifactError):
        States(tmp_path / "states")
    writer.close()
    with pytest.raises(ArtifactError):
        States(tmp_path / "states")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, list[Path]]:
    """Four folders of states, used in the order of their numbers."""
    cache = tmp_path / "cache"
    folders = [write(cache / str(number), range(6)) for number in range(4)]
    for number, folder in enumerate(folders):
        os.utime(folder / "states.json", (1000 + number, 1000 + number))
    return cache, folders


@pytest.mark.parametrize("room_for", [4, 3, 1, 0])
def test_what_was_used_longest_ago_makes_room(room_for: int, kept: tuple[Path, list[Path]]) -> None:
    cache, folders = kept
    assert make_room(cache, sum(map(size_of, folders[4 - room_for :])), ()) == 4 - room_for
    assert [folder.is_dir() for folder in folders] == [number >= 4 - room_for for number in range(4)]


def test_a_byte_too_few_costs_one_more(kept: tuple[Path, list[Path]]) -> None:
    cache, folders = kept
    assert make_room(cache, sum(map(size_of, folders[2:])) - 1, ()) == 3


def test_what_is_to_be_kept_is_kept(kept: tuple[Path, list[Path]]) -> None:
    cache, folders = kept
    assert make_room(cache, size_of(folders[3]), {folders[0]}) == 2
    assert [folder.is_dir() for folder in folders] == [True, False, False, True]


def test_reading_counts_as_use(kept: tuple[Path, list[Path]]) -> None:
    cache, folders = kept
    States(folders[0])
    make_room(cache, size_of(folders[0]), ())
    assert [folder.is_dir() for folder in folders] == [True, False, False, False]


def test_what_is_being_written_is_left_alone(kept: tuple[Path, list[Path]]) -> None:
    cache, _ = kept
    writer = StatesWriter(cache / ".being-written", 0, len(LENGTHS))
    assert make_room(cache, 0, ()) == 4
    for number in range(6):
        writer.add(number, as_array(states_of(number, torch.float32)), "float32")
    writer.close()
    join_parts(cache / ".being-written", 1, {})
    assert States(cache / ".being-written").complete


def test_a_cache_that_is_not_there_needs_no_room(tmp_path: Path) -> None:
    assert make_room(tmp_path / "nowhere", 0, ()) == 0


def test_who_reads_what_is_removed_goes_on_reading(kept: tuple[Path, list[Path]]) -> None:
    cache, folders = kept
    found = States(folders[0])
    make_room(cache, 0, ())
    assert not folders[0].exists()
    for number in range(6):
        assert torch.equal(as_tensor(found[number], torch.float32), states_of(number, torch.float32))
