"""Which examples two corpora have in common."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmkit.data.corpus import Corpus

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Difference:
    """How many examples both corpora have, and the numbers of those that only one has."""

    common: int
    only_first: np.ndarray
    only_second: np.ndarray


def compare_corpora(first: Corpus, second: Corpus, column: str = "input_ids") -> Difference:
    """Compares examples by the values in a column; an example that stands twice has to stand twice in the other too."""
    one, other = (_occurrences(example_hashes(corpus, column)) for corpus in (first, second))
    in_other, in_one = np.isin(one, other), np.isin(other, one)
    return Difference(int(in_other.sum()), np.flatnonzero(~in_other), np.flatnonzero(~in_one))


def example_hashes(corpus: Corpus, column: str) -> np.ndarray:
    """A hash of the values of each example in a ragged column, shape (N,)."""
    lengths = corpus.lengths(column)
    hashes = lengths.astype(np.uint64) * _MULTIPLIER
    filled = np.flatnonzero(lengths)
    if not len(filled):
        return hashes
    values = np.asarray(corpus.values(column)).astype(np.uint64)
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(values), dtype=np.uint64) - np.repeat(starts, lengths).astype(np.uint64)
    mixed = (values + np.uint64(1)) * _MULTIPLIER ^ (places * np.uint64(0xC2B2AE3D27D4EB4F))
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x165667B19E3779F9)
    hashes[filled] += np.add.reduceat(mixed ^ (mixed >> np.uint64(29)), starts[filled])
    return hashes


def _occurrences(hashes: np.ndarray) -> np.ndarray:
    """Hashes in which the second, third ... occurrence of a value is another value."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    firsts = np.flatnonzero(new)
    ranks = np.arange(len(ordered)) - np.repeat(firsts, np.diff(np.append(firsts, len(ordered))))
    found = np.empty_like(hashes)
    found[order] = ordered + ranks.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    return found
