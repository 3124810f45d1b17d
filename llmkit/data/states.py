"""Hidden states on disk: for examples of a corpus an array (L, D) each, memory-mapped, found by what decides them.

A folder holds one or more parts, files of rows of D numbers, which several processes may write at the same time, and an
index: for each example its part, first row and rows, or -1 where it has none. bf16 is kept as the 16-bit integers that
its bits are.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmkit.data.corpus import Corpus, Example
from llmkit.errors import ArtifactError
from llmkit.files import digest_file, digest_json, read_json, write_json

FORMAT = 1
STATES = "prefix_states"  # of an example: its states, what PyTorch calls their numbers, and their depth
MANIFEST, _INDEX = "states.json", "index.npy"
_ABANDONED = 86400.0  # seconds
_NUMPY = {"bfloat16": "int16", "float16": "float16", "float32": "float32"}


class KnownStates(Protocol):
    """States of the examples of a corpus."""

    dtype: str  # what PyTorch calls their numbers
    complete: bool

    def has(self, number: int) -> bool:
        """True when an example's states are there."""

    def __getitem__(self, number: int) -> np.ndarray:
        """An example's states, (L, D); of 16-bit integers where they are bf16."""


class StatesWriter:
    """Writes one part of a folder of states. Raises OSError when the disk is full."""

    def __init__(self, folder: Path, part: int, examples: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.part = folder, part
        self._file = (folder / _part(part)).open("wb")
        self._digest = hashlib.sha256()
        self._index = np.full((examples, 3), -1, np.int64)
        self._rows = 0
        self._kind: tuple[str, int] | None = None

    def add(self, number: int, states: np.ndarray, dtype: str) -> None:
        """Appends an example's states, (L, D), of numbers that PyTorch calls `dtype`."""
        self._kind = (dtype, states.shape[1])
        data = np.ascontiguousarray(states).view(_NUMPY[dtype]).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._index[number] = self.part, self._rows, len(states)
        self._rows += len(states)

    def close(self) -> None:
        """Writes what is left, and beside it what the part holds."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        np.save(self.folder / f"{_part(self.part)}.npy", self._index)
        write_json(self.folder / f"{_part(self.part)}.json", {"kind": self._kind, "sha256": self._digest.hexdigest()})


def join_parts(folder: Path, parts: int, meta: dict[str, Any]) -> None:
    """Makes one index of all parts' and writes the manifest, without which a folder holds no states."""
    index, kind, digests = None, None, {}
    for part in range(parts):
        own, said = np.load(folder / f"{_part(part)}.npy"), read_json(folder / f"{_part(part)}.json")
        index = own if index is None else np.where(own >= 0, own, index)
        kind, digests[_part(part)] = said["kind"] or kind, said["sha256"]
        for suffix in (".npy", ".json"):
            (folder / f"{_part(part)}{suffix}").unlink()
    assert index is not None, "there is a part"
    assert kind is not None, "some part has an example"
    np.save(folder / _INDEX, index)
    digests[_INDEX] = digest_file(folder / _INDEX)
    manifest = {"format": FORMAT, "dtype": kind[0], "width": kind[1], "sha256": digests, "meta": meta}
    write_json(folder / MANIFEST, manifest | {"self": digest_json(manifest)})


class States:
    """States on disk; opening them reads and checks all of them. Raises ArtifactError when they are damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._open(read_json(folder / MANIFEST))
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ArtifactError("kept hidden states are damaged", got=repr(error), where=folder) from None

    def _open(self, manifest: dict[str, Any]) -> None:
        if manifest["format"] != FORMAT:
            raise ArtifactError("hidden states of another llmkit", got=manifest["format"], expected=str(FORMAT))
        said = {key: value for key, value in manifest.items() if key != "self"}
        for name, expected in {**manifest["sha256"], MANIFEST: manifest["self"]}.items():
            path = self.folder / name
            found = digest_json(said) if name == MANIFEST else digest_file(path) if path.is_file() else "no file"
            if found != expected:
                raise ArtifactError("kept hidden states are damaged", got=found, expected=expected, where=path)
        self.dtype: str = manifest["dtype"]
        self.meta: dict[str, Any] = manifest["meta"]
        self._index = np.load(self.folder / _INDEX)
        self.complete = bool((self._index[:, 0] >= 0).all())  # every example's states are there
        names = sorted(name for name in manifest["sha256"] if name != _INDEX)
        self._parts = [self._map(self.folder / name, manifest["width"]) for name in names]
        os.utime(self.folder / MANIFEST)  # used now: `make_room` takes the oldest first

    def _map(self, path: Path, width: int) -> np.ndarray:
        kind = _NUMPY[self.dtype]
        empty = np.zeros((0, width), kind)
        return np.memmap(path, kind, "r").reshape(-1, width) if path.stat().st_size else empty

    def has(self, number: int) -> bool:
        """True when an example's states are there."""
        return bool(self._index[number, 0] >= 0)

    def __getitem__(self, number: int) -> np.ndarray:
        """An example's states, (L, D); of 16-bit integers where they are bf16."""
        part, first, rows = self._index[number].tolist()
        return self._parts[part][first : first + rows]

    @property
    def bytes(self) -> int:
        """What they take on disk."""
        return sum(part.nbytes for part in self._parts)


class CorpusWithStates(Sequence[Example]):
    """A corpus whose examples bring what leaves the frozen prefix, where that is known."""

    def __init__(self, corpus: Corpus, states: Mapping[int, KnownStates]) -> None:
        """`states` are by the number of blocks before them."""
        self.corpus, self._by_depth = corpus, states
        self.folder = corpus.folder
        self.depth = max(states)

    def require_unchanged(self) -> None:
        """Raises ArtifactError when a file of the corpus is gone or was written to."""
        self.corpus.require_unchanged()

    def descend(self, depth: int) -> None:
        """From now on gives the deepest states of at most so many blocks, if there are any."""
        self.depth = max((known for known in self._by_depth if known <= depth), default=0)

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, number: Any) -> Any:
        example = self.corpus[number]
        states = self._by_depth.get(self.depth)
        if states is None or not states.has(number):
            return example
        return example | {STATES: (states[number], states.dtype, self.depth)}

    def lengths(self, column: str) -> np.ndarray:
        """As the corpus has them."""
        return self.corpus.lengths(column)

    def apart(self, numbers: Sequence[int]) -> list[list[int]]:
        """The examples whose states are known, and the others: what is batched together is left out together."""
        states = self._by_depth.get(self.depth)
        if states is None or states.complete:
            return [list(numbers)]
        known = [number for number in numbers if states.has(number)]
        return [known, [number for number in numbers if not states.has(number)]]


def make_room(cache: Path, most_bytes: int, keep: Collection[Path]) -> int:
    """Removes the states used longest ago until all but `keep` take `most_bytes` at most; gives how many it removed.

    Whoever still reads what is removed goes on doing so: a file lives as long as it is open.
    """
    for left_over in cache.glob(".*-*"):  # by computations that were killed
        if time.time() - _changed(left_over) > _ABANDONED:
            shutil.rmtree(left_over, ignore_errors=True)
    found = [path.parent for path in cache.glob(f"*/{MANIFEST}") if path.parent not in keep]
    oldest = sorted(found, key=lambda folder: _changed(folder / MANIFEST))
    sizes = {folder: folder_bytes(folder) for folder in oldest}
    removed = 0
    for folder in oldest:
        if sum(sizes.values()) <= most_bytes:
            break
        shutil.rmtree(folder, ignore_errors=True)
        del sizes[folder]
        removed += 1
    return removed


def _changed(path: Path) -> float:
    """When; 0 for what another process has just removed."""
    return path.stat().st_mtime if path.exists() else 0.0


def folder_bytes(folder: Path) -> int:
    """What a folder's files take."""
    return sum(file.stat().st_size for file in folder.glob("*") if file.exists())


def _part(number: int) -> str:
    return f"part-{number:05d}.bin"
