"""What training data and held-out data have in common: examples that are nearly the same, and long passages.

Everything is told from token ids. A window is a run of so many tokens, known by a hash. Windows that many examples
share are what a template writes, or a common phrase, and tell nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.data.differences import example_hashes
from llmkit.data.workers import cores

NEAR = 0.8  # of the windows of two examples that both have (Jaccard index), or of the held-out one's when it is within
PASSAGE = 32  # tokens in a row in common
_WINDOW = 5  # tokens, to tell whether two examples are alike
_LONG_WINDOW = 12  # tokens, to look within longer examples: shorter runs of words meet by chance
_COMMON = 3  # examples, at least, whose windows tell nothing
_COMMON_HELD_OUT = 0.01  # and this share of the held-out ones
_COMMON_LEARNT = 0.1  # or this share of those that are learnt
_PARTS_LOOKED_AT = 8  # of the training data, to learn what is common there
_TOKENS_AT_ONCE = 6_000_000  # of held-out data; more are compared in turn
_THREADS = 4
_SHOWN = 20
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_BASE = np.uint64(0x100000001B3)
_INVERSE = np.uint64(pow(0x100000001B3, -1, 1 << 64))


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
    total, before = sum(map(len, train)), 0
    leaks = Leaks(np.zeros(total, bool), np.zeros(total, bool), np.zeros(total, bool))
    for group in _groups(held_out, column):
        _compare(leaks, train, group, column, before, within=within)
        before += sum(map(len, group))
    return leaks


def _groups(held_out: Sequence[Corpus], column: str) -> Iterator[list[Corpus]]:
    """Held-out parts of so many tokens together that their windows fit in memory with ease."""
    group: list[Corpus] = []
    tokens = 0
    for part in held_out:
        size = len(part.values(column))
        if group and tokens + size > _TOKENS_AT_ONCE:
            yield group
            group, tokens = [], 0
        group.append(part)
        tokens += size
    if group:
        yield group


def _compare(
    leaks: Leaks, train: Sequence[Corpus], held_out: Sequence[Corpus], column: str, first: int, *, within: bool
) -> None:
    """Takes in what training data have in common with some held-out parts, whose examples count from `first` on."""
    contents = np.concatenate([np.zeros(0, np.uint64), *(example_hashes(part, column) for part in held_out)])
    widths = [_LONG_WINDOW] if within else [_LONG_WINDOW, _WINDOW]
    indexes = _index(held_out, train, column, contents, widths)

    def compared(part: Corpus) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, float]]]:
        met = _met(part, column, indexes)
        near = indexes[-1].near(met[-1], within=within)
        return np.isin(example_hashes(part, column), contents), indexes[0].passages(met[0]), near

    before = 0
    with ThreadPoolExecutor(min(cores(), _THREADS)) as pool:  # sorting and looking up leave the interpreter free
        for part, (same, passages, near) in zip(train, pool.map(compared, train), strict=True):
            mine = slice(before, before + len(part))
            leaks.same[mine] |= same
            leaks.passages[mine] |= passages
            for example, other, alike in near:
                leaks.near[before + example] = True
                if len(leaks.shown) < _SHOWN:
                    leaks.shown.append((before + example, first + other, alike))
            before += len(part)
    leaks.held_out_covered += indexes[0].covered()


@dataclass(frozen=True)
class _Windows:
    """The windows of a part: their hashes and the example that each is of, (W,), and where examples start, (N + 1,)."""

    hashes: np.ndarray
    owners: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class _Met:
    """The windows of a part that are in an index: `places` among the part's, ascending, and `numbers` in the index."""

    windows: _Windows
    places: np.ndarray
    numbers: np.ndarray

    def pairs(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Each example with each window that it has, of an index of `count` windows, once."""
        codes = _distinct(self.windows.owners[self.places] * count + self.numbers)
        examples, numbers = np.divmod(codes, max(count, 1))
        return examples, numbers


def _index(
    held_out: Sequence[Corpus], train: Sequence[Corpus], column: str, contents: np.ndarray, widths: Sequence[int]
) -> list[_Index]:
    """The windows of the held-out examples, an index for each width; it is noted which tell nothing."""
    found: list[list[_Windows]] = [_windows(part, column, widths) for part in held_out]
    _, firsts, same = np.unique(contents, return_index=True, return_inverse=True)
    first_same = firsts[same] if len(contents) else np.zeros(0, np.int64)
    looked_at = train[:: max(1, len(train) // _PARTS_LOOKED_AT)]
    indexes = [_Index([windows[at] for windows in found], first_same, width) for at, width in enumerate(widths)]
    with ThreadPoolExecutor(min(cores(), _THREADS)) as pool:
        for met in pool.map(lambda part: _met(part, column, indexes), looked_at):
            for index, mine in zip(indexes, met, strict=True):
                index.count_learnt(mine)
    for index in indexes:
        index.settle(len(firsts), sum(map(len, looked_at)))
    return indexes


class _Index:
    """The windows of the held-out examples, sorted by hash; of examples that are the same, only of the first."""

    def __init__(self, parts: Sequence[_Windows], first_same: np.ndarray, width: int) -> None:
        self.width = width
        self._same = first_same
        starts = np.cumsum([0, *(len(part.starts) - 1 for part in parts)])
        owners = [part.owners + start for part, start in zip(parts, starts, strict=False)]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(part.hashes for part in parts)])
        owner = np.concatenate([np.zeros(0, np.int64), *owners])
        own = first_same[owner] == owner
        hashes, owner = hashes[own], owner[own]
        order = np.lexsort((owner, hashes))
        hashes, owner = hashes[order], owner[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
        hashes, self._owners = hashes[new], owner[new].astype(np.int32)
        firsts = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]])[: len(hashes)])
        self.hashes = hashes[firsts]
        self._starts = np.append(firsts, len(hashes))  # of each window's owners
        self._common = np.zeros(len(self.hashes), bool)
        self._learnt = np.zeros(len(self.hashes), np.int32)
        self._seen = np.zeros(len(self.hashes), bool)
        self._bits = np.uint64(64 - min(27, max(12, len(self.hashes).bit_length() + 3)))
        self._maybe = np.zeros(1 << (64 - int(self._bits)), bool)
        self._maybe[self.hashes >> self._bits] = True

    def count_learnt(self, met: _Met) -> None:
        """Takes in which windows training examples have."""
        _, numbers = met.pairs(len(self.hashes))
        self._learnt += np.bincount(numbers, minlength=len(self.hashes)).astype(np.int32)

    def settle(self, held_out: int, learnt: int) -> None:
        """Decides which windows tell nothing, by the numbers of different examples that were looked at."""
        self._common = np.diff(self._starts) > max(_COMMON, _COMMON_HELD_OUT * held_out)
        self._common |= self._learnt > max(_COMMON, _COMMON_LEARNT * learnt)
        telling = np.repeat(~self._common, np.diff(self._starts))
        self._windows_of = np.bincount(self._owners[telling], minlength=len(self._same))

    def meet(self, windows: _Windows) -> _Met:
        """Looks a part's windows up; a table of bits rules most of the others out."""
        places = np.flatnonzero(self._maybe[windows.hashes >> self._bits])
        asked = windows.hashes[places]
        order = np.argsort(asked)  # so that the search walks through memory in one direction
        numbers = np.empty(len(asked), np.int64)
        numbers[order] = np.searchsorted(self.hashes, asked[order])
        found = self.hashes[np.minimum(numbers, len(self.hashes) - 1)] == asked if len(self.hashes) else asked != asked
        return _Met(windows, places[found], numbers[found])

    def passages(self, met: _Met) -> np.ndarray:
        """Which of a part's examples share a long passage with a held-out one, shape (N,); notes which windows were met."""
        found = np.zeros(len(met.windows.starts) - 1, bool)
        self._seen[met.numbers] = True
        if len(met.places):
            owners = met.windows.owners[met.places]
            breaks = (np.diff(met.places) != 1) | (np.diff(owners) != 0)
            run = np.concatenate([[0], np.cumsum(breaks)])
            lengths, own = np.bincount(run), np.bincount(run, ~self._common[met.numbers])
            least = PASSAGE - self.width + 1  # windows; common ones go with a passage, and make none
            long = (own >= least) | ((lengths >= least) & (own * 2 >= lengths))
            found[owners[long[run]]] = True
        return found

    def near(self, met: _Met, *, within: bool) -> list[tuple[int, int, float]]:
        """The examples of a part that are nearly a held-out one, with the one that each is most like, and how much."""
        examples, numbers = met.pairs(len(self.hashes))
        telling = ~self._common[numbers]
        examples, numbers = examples[telling], numbers[telling]
        counts = self._starts[numbers + 1] - self._starts[numbers]  # held-out examples with a window
        spread = np.repeat(self._starts[numbers] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        codes = np.sort(np.repeat(examples, counts) * max(len(self._same), 1) + self._owners[spread])
        firsts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]])[: len(codes)])
        shared = np.diff(np.append(firsts, len(codes)))
        example_of, other_of = np.divmod(codes[firsts], max(len(self._same), 1))
        promising = np.flatnonzero(shared >= NEAR * self._windows_of[other_of])  # which both measures ask for
        best: dict[int, tuple[int, float]] = {}
        for pair in promising.tolist():
            example, other, common = int(example_of[pair]), int(other_of[pair]), int(shared[pair])
            own = common if within else self._own(met.windows, example)
            alike = common / (own + self._windows_of[other] - common)
            if alike >= NEAR and alike > best.get(example, (0, 0.0))[1]:
                best[example] = (other, float(alike))
        return [(example, *found) for example, found in sorted(best.items())]

    def _own(self, windows: _Windows, example: int) -> int:
        """How many different windows of an example tell something."""
        mine = _distinct(windows.hashes[windows.starts[example] : windows.starts[example + 1]])
        places = np.minimum(np.searchsorted(self.hashes, mine), len(self.hashes) - 1)
        return int(np.sum(~(self._common[places] & (self.hashes[places] == mine))))

    def covered(self) -> int:
        """How many held-out examples have nearly all their windows among those that were met."""
        met = np.repeat(self._seen & ~self._common, np.diff(self._starts))
        seen = np.bincount(self._owners[met], minlength=len(self._same))
        full = (seen >= NEAR * self._windows_of) & (self._windows_of > 0)
        return int(np.sum(full[self._same]))


def _met(part: Corpus, column: str, indexes: Sequence[_Index]) -> list[_Met]:
    """What the indexes have of a part."""
    windows = _windows(part, column, [index.width for index in indexes])
    return [index.meet(mine) for index, mine in zip(indexes, windows, strict=True)]


def _windows(corpus: Corpus, column: str, widths: Sequence[int]) -> list[_Windows]:
    """The windows of each width: polynomials of their tokens, as differences of one running sum, modulo 2**64."""
    lengths = corpus.lengths(column)
    tokens = (np.asarray(corpus.values(column)).astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    tokens ^= tokens >> np.uint64(29)
    sums = np.zeros(len(tokens) + 1, np.uint64)
    np.cumsum(tokens * _powers(_INVERSE, len(tokens)), out=sums[1:])
    powers = _powers(_BASE, len(tokens))
    ends = np.cumsum(lengths)
    found = []
    for width in widths:
        counts = np.maximum(lengths - width + 1, 0)
        windows = max(len(tokens) - width + 1, 0)
        hashes = (sums[width : width + windows] - sums[:windows]) * powers[:windows]
        hashes ^= hashes >> np.uint64(32)
        hashes *= _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
        inside = np.ones(len(tokens), bool)  # windows that begin in the last tokens of an example reach into the next
        for back in range(1, width):
            inside[np.maximum(ends - back, 0)[lengths >= back]] = False
        owners = np.repeat(np.arange(len(lengths)), counts)
        found.append(_Windows(hashes[inside[:windows]], owners, np.concatenate([[0], np.cumsum(counts)])))
    return found


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """1, base, base**2, ... modulo 2**64."""
    powers = np.full(count, base)
    powers[:1] = 1
    return np.cumprod(powers)


def _distinct(values: np.ndarray) -> np.ndarray:
    """The different values, ascending."""
    ordered = np.sort(values)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]]
