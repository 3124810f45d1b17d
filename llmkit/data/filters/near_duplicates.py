"""Takes out rows whose text is nearly that of an earlier one.

Texts are sets of runs of words; how much of two sets is common (their Jaccard index) is estimated from MinHash signatures
(Broder, 1997), and which pairs are worth a look is found by bands of signatures that are equal (Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, chapter 3).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.data.filters import row_text
from llmkit.data.filters.comparison import Comparison, first_of_equal
from llmkit.errors import RecipeError

_SLOTS = 128  # numbers in a signature; the estimate is good to about 0.04
_SURE = 0.99  # with which a pair exactly at the threshold shares a band
_WORD = re.compile(r"\w+")
_ROWS_AT_ONCE = 1 << 16


class NearDuplicatesFilter(Comparison):
    """Keeps the first of rows that share `threshold` or more of their runs of `words` words; case and marks do not count.

    512 bytes a row are kept on disk while preprocessing. Raises ValueError for values that make no sense, and RecipeError
    when the package `rensa` is missing.
    """

    reason = "nearly the same as an earlier row"

    def __init__(self, threshold: float = 0.8, words: int = 5) -> None:
        if not 0.3 <= threshold <= 1:
            raise ValueError(f"threshold is {threshold}, not from 0.3 to 1")
        if words < 1:
            raise ValueError(f"words is {words}, less than 1")
        try:
            from rensa import RMinHash
        except ImportError:
            raise RecipeError(
                "near duplicates need a package that is not installed",
                got="no rensa",
                hint="pip install 'llmkit[data]'",
                where="data.filters",
            ) from None
        self._sketch = RMinHash
        self.threshold = threshold
        self.words = words

    def key(self, row: dict[str, Any]) -> np.ndarray:
        """The signature of the row's text."""
        sketch = self._sketch(_SLOTS, 1)
        sketch.update(word_runs(row_text(row), self.words))
        return np.array(sketch.digest(), np.uint32)

    def none(self) -> np.ndarray:
        """No signatures."""
        return np.zeros((0, _SLOTS), np.uint32)

    def repeats(self, keys: Sequence[np.ndarray], alive: np.ndarray) -> np.ndarray:
        """The first row of those that are alike, directly or by others between them."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        numbers = np.flatnonzero(alive)
        places = np.arange(len(numbers))
        pairs = [np.zeros((2, 0), np.int64)]
        before = places.copy()  # the row that each was last found to be like
        width = _band_width(self.threshold)
        for start in range(0, _SLOTS - width + 1, width):
            band = np.concatenate([np.asarray(part[:, start : start + width]) for part in [*keys, self.none()]])
            firsts = first_of_equal(band[numbers])
            unlike = np.flatnonzero((firsts < places) & (firsts != before))
            for part in np.array_split(unlike, len(unlike) // _ROWS_AT_ONCE + 1):
                one, other = _signatures(keys, numbers[part]), _signatures(keys, numbers[firsts[part]])
                alike = part[(one == other).mean(axis=1) >= self.threshold]
                before[alike] = firsts[alike]
                pairs.append(np.stack([alike, firsts[alike]]))
        ones, others = np.concatenate(pairs, axis=1)
        edges = coo_array((np.ones(len(ones), bool), (ones, others)), shape=(len(numbers), len(numbers)))
        _, groups = connected_components(edges, directed=False)
        firsts = first_of_equal(groups)
        found = np.full(len(alive), -1, np.int64)
        found[numbers] = np.where(firsts < places, numbers[firsts], -1)
        return found


def word_runs(text: str, words: int) -> list[str]:
    """All runs of so many words, in lower case; a shorter text is one run, and one without words stands for itself."""
    found = _WORD.findall(text.casefold())
    if len(found) <= words:
        return [" ".join(found) or text]
    return list(map(" ".join, zip(*(found[start:] for start in range(words)), strict=False)))


def _band_width(threshold: float) -> int:
    """The widest bands that a pair at the threshold still shares one of, nearly surely."""
    sure = [width for width in range(1, 33) if 1 - (1 - threshold**width) ** (_SLOTS // width) >= _SURE]
    return max(sure)


def _signatures(keys: Sequence[np.ndarray], numbers: np.ndarray) -> np.ndarray:
    """Some rows of the keys, shape (len(numbers), W)."""
    ends = np.cumsum([len(part) for part in keys])
    places = np.searchsorted(ends, numbers, side="right")
    found = np.empty((len(numbers), _SLOTS), np.uint32)
    for place in np.unique(places):
        mine = places == place
        found[mine] = keys[place][numbers[mine] - (ends[place] - len(keys[place]))]
    return found
