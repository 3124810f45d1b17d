"""What training data and held-out data have in common: examples that are nearly the same, and long passages.

Everything is told from token ids. A window is a run of so many tokens, known by a hash. Windows that many examples
share are what a template writes, or a common phrase, and tell nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.data.differences import example_hashes

NEAR = 0.8  # of the windows of two examples that both have (Jaccard index), or of the held-out one's when it is within
PASSAGE = 32  # tokens in a row in common
_WINDOW = 5  # tokens, to tell whether two examples are alike
_LONG_WINDOW = 12  # tokens, to look within longer examples: shorter runs of words meet by chance
_COMMON = 3  # examples, at least, whose windows tell nothing
_COMMON_HELD_OUT = 0.01  # and this share of the held-out ones
_COMMON_LEARNT = 0.1  # or this share of those that are learnt
_SHOWN = 20
_BITS = 24
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass
class Leaks:
    """What was found; numbers of examples are counted from the first part on."""

    same: np.ndarray  # (N,) of the training examples: a held-out one has just the same tokens
    near: np.ndarray  # (N,) nearly so, or just so
    passages: np.ndarray  # (N,) shares a long passage with a held-out example
    held_out_covered: int = 0  # held-out examples of which the training data have nearly all passages
    shown: list[tuple[int, int, float]] = field(default_factory=list)  # training example, held-out example, how alike


def find_leaks(
    train: Sequence[Corpus], held_out: Sequence[Corpus], column: str = "input_ids", *, within: bool = False
) -> Leaks:
    """Compares examples by the tokens in a column.

    `within` counts a training example as near when it holds a held-out one, and not only when both are alike.
    """
    long = _Index(held_out, train, column, _LONG_WINDOW)
    index = long if within else _Index(held_out, train, column, _WINDOW)
    total = sum(map(len, train))
    leaks = Leaks(np.zeros(total, bool), np.zeros(total, bool), np.zeros(total, bool))
    contents = np.concatenate([np.zeros(0, np.uint64), *(example_hashes(part, column) for part in held_out)])
    before = 0
    for part in train:
        mine = slice(before, before + len(part))
        leaks.same[mine] = np.isin(example_hashes(part, column), contents)
        leaks.passages[mine] = long.passages(part)
        for example, other, alike in index.near(part, within=within):
            leaks.near[before + example] = True
            if len(leaks.shown) < _SHOWN:
                leaks.shown.append((before + example, other, alike))
        before += len(part)
    leaks.held_out_covered = long.covered()
    return leaks


class _Index:
    """The windows of the held-out examples, without those that many examples of either side have.

    Held-out examples that are the same count as one. Pairs of a window's hash and its example are sorted by the hash.
    """

    def __init__(self, held_out: Sequence[Corpus], train: Sequence[Corpus], column: str, width: int) -> None:
        self._column, self._width = column, width
        hashes, owners, before = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)], 0
        for part in held_out:
            found, owner, _ = _windows(part, column, width)
            hashes.append(found)
            owners.append(owner + before)
            before += len(part)
        contents = np.concatenate([np.zeros(0, np.uint64), *(example_hashes(part, column) for part in held_out)])
        _, firsts, same = np.unique(contents, return_index=True, return_inverse=True)
        self._same = firsts[same]  # for each held-out example the first that is equal to it
        owner = self._same[np.concatenate(owners)] if before else np.concatenate(owners)
        pairs = np.unique(np.stack([np.concatenate(hashes), owner.astype(np.uint64)], axis=1), axis=0)
        self._keep(pairs, np.zeros(0, np.uint64))
        values, counts = np.unique(pairs[:, 0], return_counts=True)
        learnt = np.zeros(len(values), np.int64)
        for part in train:
            places, _, _ = self._met(part)
            learnt += np.bincount(np.searchsorted(values, self._hashes[places]), minlength=len(values))
        many = counts > max(_COMMON, _COMMON_HELD_OUT * len(firsts))
        many |= learnt > max(_COMMON, _COMMON_LEARNT * sum(map(len, train)))
        self._keep(pairs[~np.isin(pairs[:, 0], values[many])], values[many])
        self._seen = np.zeros(len(self._hashes), bool)

    def _keep(self, pairs: np.ndarray, common: np.ndarray) -> None:
        self._hashes, self._owners = pairs[:, 0].copy(), pairs[:, 1].astype(np.int64)
        self._common = common
        self._windows_of = np.bincount(self._owners, minlength=len(self._same))
        self._maybe, self._maybe_common = _bitmap(self._hashes), _bitmap(self._common)

    def _met(self, part: Corpus) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The windows that are met in a part, each once an example: their first places in the index, and the examples."""
        hashes, owner, starts = _windows(part, self._column, self._width)
        hits = _members(hashes, self._hashes, self._maybe)
        places = np.searchsorted(self._hashes, hashes[hits])
        codes = np.unique(owner[hits] * max(len(self._hashes), 1) + places)
        examples, places = np.divmod(codes, max(len(self._hashes), 1))
        return places, examples, (hashes, owner, starts)

    def passages(self, part: Corpus) -> np.ndarray:
        """Which of a part's examples share a long passage with a held-out one, shape (N,); notes which windows were met."""
        found = np.zeros(len(part), bool)
        hashes, owner, _ = _windows(part, self._column, self._width)
        hits = _members(hashes, self._hashes, self._maybe)
        self._see(hashes[hits])
        shared = np.zeros(len(hashes), np.int8)
        shared[_members(hashes, self._common, self._maybe_common)] = 1  # goes with a passage, and makes none
        shared[hits] = 2
        places = np.flatnonzero(shared)
        if len(places):
            breaks = (np.diff(places) != 1) | (np.diff(owner[places]) != 0)
            run = np.concatenate([[0], np.cumsum(breaks)])
            lengths, own = np.bincount(run), np.bincount(run, shared[places] == 2)
            least = PASSAGE - self._width + 1
            long = (own >= least) | ((lengths >= least) & (own * 2 >= lengths))
            found[owner[places[long[run]]]] = True
        return found

    def near(self, part: Corpus, *, within: bool) -> list[tuple[int, int, float]]:
        """The examples of a part that are nearly a held-out one, with the one that each is most like, and how much."""
        places, examples, (hashes, _, starts) = self._met(part)
        counts = (
            np.searchsorted(self._hashes, self._hashes[places], side="right") - places
        )  # held-out ones with a window
        spread = np.repeat(places - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        pairs, shared = np.unique(
            np.repeat(examples, counts) * len(self._same) + self._owners[spread], return_counts=True
        )
        example_of, other_of = np.divmod(pairs, max(len(self._same), 1))
        promising = np.flatnonzero(shared >= NEAR * self._windows_of[other_of])  # which both measures ask for
        best: dict[int, tuple[int, float]] = {}
        for pair in promising.tolist():
            example, other, common = int(example_of[pair]), int(other_of[pair]), int(shared[pair])
            own = common if within else self._own(hashes[starts[example] : starts[example + 1]])
            alike = common / (own + self._windows_of[other] - common)
            if alike >= NEAR and alike > best.get(example, (0, 0.0))[1]:
                best[example] = (other, float(alike))
        return [(example, *found) for example, found in sorted(best.items())]

    def _own(self, windows: np.ndarray) -> int:
        """How many different windows tell something."""
        windows = np.unique(windows)
        return int(np.sum(~np.isin(windows, self._common)))

    def covered(self) -> int:
        """How many held-out examples have nearly all their windows among those that were met."""
        seen = np.bincount(self._owners[self._seen], minlength=len(self._same))
        full = (seen >= NEAR * self._windows_of) & (self._windows_of > 0)
        return int(np.sum(full[self._same]))

    def _see(self, hashes: np.ndarray) -> None:
        found = np.unique(hashes)
        low, high = np.searchsorted(self._hashes, found), np.searchsorted(self._hashes, found, side="right")
        marks = np.zeros(len(self._hashes) + 1, np.int64)
        np.add.at(marks, low, 1)
        np.add.at(marks, high, -1)
        self._seen |= np.cumsum(marks)[:-1] > 0


def _windows(corpus: Corpus, column: str, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hash of each window, the example that it is of, and where each example's windows start, shape (N + 1,)."""
    lengths = corpus.lengths(column)
    counts = np.maximum(lengths - width + 1, 0)
    starts = np.concatenate([[0], np.cumsum(counts)])
    tokens = np.asarray(corpus.values(column)).astype(np.uint64)
    if len(tokens) < width:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64), starts
    tokens = (tokens + np.uint64(1)) * _MULTIPLIER
    tokens ^= tokens >> np.uint64(29)
    hashes = np.zeros(len(tokens) - width + 1, np.uint64)
    for place in range(width):
        hashes = hashes * np.uint64(0x100000001B3) + tokens[place : place + len(hashes)]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MULTIPLIER
    ends = np.cumsum(lengths)
    inside = np.ones(len(tokens), bool)  # windows that begin in the last tokens of an example reach into the next
    for back in range(1, width):
        inside[np.maximum(ends - back, 0)[lengths >= back]] = False
    owner = np.repeat(np.arange(len(lengths)), counts)
    return hashes[inside[: len(hashes)]], owner, starts


def _bitmap(hashes: np.ndarray) -> np.ndarray:
    marks = np.zeros(1 << _BITS, bool)
    marks[hashes >> np.uint64(64 - _BITS)] = True
    return marks


def _members(hashes: np.ndarray, known: np.ndarray, maybe: np.ndarray) -> np.ndarray:
    """The places of hashes that are among the known ones, which are sorted; `maybe` rules most of the others out."""
    places = np.flatnonzero(maybe[hashes >> np.uint64(64 - _BITS)])
    found = np.searchsorted(known, hashes[places])
    return places[known[np.minimum(found, len(known) - 1)] == hashes[places]] if len(known) else places[:0]
