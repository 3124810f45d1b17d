"""Kept hidden states by example: what one corpus had computed is found by another that holds the same examples.

The folds of a cross-validation, shares of a data set, and data to which rows were added are such corpora.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.data.states import MANIFEST, States
from llmkit.errors import ArtifactError
from llmkit.files import digest_file, read_json

EXAMPLES = "examples.npy"
_BYTES = 16  # of an example's digest; all zero for an example without states
_NOT_OF_THE_EXAMPLE = ("source",)  # the number of a source is another in another corpus


def example_digests(corpus: Corpus) -> np.ndarray:
    """What tells the examples of any corpora apart, (N, 16): digests of all columns but the number of the source."""
    names = sorted(name for name in corpus.columns if name not in _NOT_OF_THE_EXAMPLE)
    found = np.zeros((len(corpus), _BYTES), np.uint8)
    for number, example in enumerate(corpus):
        digest = hashlib.blake2b(digest_size=_BYTES)
        for name in names:
            value = np.ascontiguousarray(example[name])
            digest.update(f"{name} {value.dtype} {value.size} ".encode())
            digest.update(value.tobytes())
        found[number] = np.frombuffer(digest.digest(), np.uint8)
    return found


def save_examples(folder: Path, digests: np.ndarray, written: np.ndarray) -> str:
    """Writes beside states whose they are, and gives the file's SHA-256; `written` are the examples that have some."""
    own = np.zeros_like(digests)
    own[written] = digests[written]
    np.save(folder / EXAMPLES, own)
    return digest_file(folder / EXAMPLES)


class PooledStates:
    """States of a corpus that lie in several folders."""

    def __init__(self, states: Sequence[States], where: np.ndarray) -> None:
        """`where` are, for each example, the number of its folder, or -1, and its own number there, (N, 2)."""
        self._states, self._where = states, where
        self.dtype = states[0].dtype
        self.complete = bool((where[:, 0] >= 0).all())

    def has(self, number: int) -> bool:
        """True when an example's states are there."""
        return bool(self._where[number, 0] >= 0)

    def __getitem__(self, number: int) -> np.ndarray:
        """An example's states, (L, D)."""
        part, own = self._where[number].tolist()
        return self._states[part][own]


class StatePool:
    """All folders with states of one prefix, the oldest first: what is added later changes nothing for what there is."""

    def __init__(self, cache: Path, prefix: str) -> None:
        found = []
        for manifest in cache.glob(f"*/{MANIFEST}"):
            if manifest.parent.name.startswith("."):
                continue  # being written
            try:
                meta = read_json(manifest)["meta"]
                path = manifest.parent / EXAMPLES
                if meta.get("prefix") == prefix and digest_file(path) == meta["examples"]:
                    found.append((meta["created"], manifest.parent.name, np.load(path)))
            except (ArtifactError, OSError, KeyError, TypeError, ValueError):
                continue  # of another llmkit, damaged, or just removed: nothing to build on
        self._cache = cache
        self._members = sorted(found, key=lambda member: member[:2])

    def without(self, folders: Iterable[Path]) -> StatePool:
        """The same but for some folders."""
        names, found = {folder.name for folder in folders}, copy(self)
        found._members = [member for member in self._members if member[1] not in names]
        return found

    def choose(self, digests: np.ndarray) -> tuple[list[Path], np.ndarray]:
        """The folders that some examples need, and where each example lies in them, as `PooledStates` takes it."""
        wanted: dict[bytes, list[int]] = {}
        for number, digest in enumerate(digests):
            wanted.setdefault(digest.tobytes(), []).append(number)
        where = np.full((len(digests), 2), -1, np.int64)
        folders: list[Path] = []
        for _, name, theirs in self._members:
            mine = [(own, wanted.pop(key)) for own, row in enumerate(theirs) if (key := row.tobytes()) in wanted]
            for own, numbers in mine:
                where[numbers] = len(folders), own
            if mine:
                folders.append(self._cache / name)
        return folders, where
