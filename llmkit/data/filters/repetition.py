"""Takes out text that repeats itself: the rules of Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, table A1).

Characters are those of words, white space left out. A duplicate n-gram is one that has occurred before in the text; of
overlapping ones each word counts once.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from llmkit.data.filters import row_text
from llmkit.data.filters.words import split_lines, split_words

_PARAGRAPH_END = re.compile(r"\n(?:[ \t]*\n)+")
_STEP = np.uint64(0x5851F42D4C957F2D)  # of the rolling hash (Knuth's MMIX)


class RepetitionFilter:
    """Keeps text in which no share of what is repeated is above its threshold (None switches a rule off).

    `duplicate_lines` and `duplicate_paragraphs` are shares of lines and paragraphs, those with `_chars` of characters;
    `top_N_gram` is the share of characters in the most frequent run of N words, `duplicate_N_grams` in runs that occurred
    before. Raises ValueError for thresholds that are no shares.
    """

    def __init__(
        self,
        duplicate_lines: float | None = 0.3,
        duplicate_line_chars: float | None = 0.2,
        duplicate_paragraphs: float | None = 0.3,
        duplicate_paragraph_chars: float | None = 0.2,
        top_2_gram: float | None = 0.2,
        top_3_gram: float | None = 0.18,
        top_4_gram: float | None = 0.16,
        duplicate_5_grams: float | None = 0.15,
        duplicate_6_grams: float | None = 0.14,
        duplicate_7_grams: float | None = 0.13,
        duplicate_8_grams: float | None = 0.12,
        duplicate_9_grams: float | None = 0.11,
        duplicate_10_grams: float | None = 0.1,
    ) -> None:
        for name, value in list(locals().items()):
            if isinstance(value, int | float) and not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, not a share from 0 to 1")
        self._lines = (duplicate_lines, duplicate_line_chars)
        self._paragraphs = (duplicate_paragraphs, duplicate_paragraph_chars)
        top = {2: top_2_gram, 3: top_3_gram, 4: top_4_gram}
        duplicate = {5: duplicate_5_grams, 6: duplicate_6_grams, 7: duplicate_7_grams}
        duplicate |= {8: duplicate_8_grams, 9: duplicate_9_grams, 10: duplicate_10_grams}
        self._top = {n: share for n, share in top.items() if share is not None}
        self._duplicate = {n: share for n, share in duplicate.items() if share is not None}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, or the rule that it breaks."""
        text = row_text(row)
        parts = (("line", self._lines, split_lines), ("paragraph", self._paragraphs, _PARAGRAPH_END.split))
        for name, thresholds, split in parts:
            if thresholds != (None, None) and (reason := _repeated_parts(name, split(text), *thresholds)):
                return reason
        if self._top or self._duplicate:
            return _Grams(split_words(text)).reason(self._top, self._duplicate) or row
        return row


def _repeated_parts(name: str, parts: list[str], count: float | None, chars: float | None) -> str | None:
    distinct = set(parts)
    if len(distinct) == len(parts):
        return None
    if count is not None and len(parts) - len(distinct) > count * len(parts):
        return f"too many duplicate {name}s"
    total = sum(map(len, parts))
    if chars is not None and total - sum(map(len, distinct)) > chars * total:
        return f"too many characters in duplicate {name}s"
    return None


class _Grams:
    """The runs of words of a text, as hashes: of 64 bits, so that runs of equal ones are equal as good as surely."""

    def __init__(self, words: list[str]) -> None:
        count = len(words)
        self._codes = np.fromiter(map(hash, words), np.int64, count).view(np.uint64)
        self._lengths = np.fromiter(map(len, words), np.int64, count)
        self._chars = np.zeros(count + 1, np.int64)  # of the words before each
        np.cumsum(self._lengths, out=self._chars[1:])
        self._total = int(self._chars[-1])

    def reason(self, top: dict[int, float], duplicate: dict[int, float]) -> str | None:
        """The first rule that is broken."""
        most = len(self._codes)  # how often a run of the last length occurred at most; longer runs do not more often
        for n, threshold in top.items():
            if most < 2 or len(self._codes) < n or most * self._longest(n) <= threshold * self._total:
                continue
            most, chars = self._most_frequent(n, threshold * self._total)
            if chars > threshold * self._total:
                return f"too many characters in the most frequent {n}-gram"
        if not duplicate:
            return None
        repeated = self._repeated(min(duplicate))
        allowed = min(duplicate.values()) * self._total
        if not len(repeated) or self._covered(repeated, max(duplicate)) <= allowed:
            return None  # longer runs repeat at the same places or fewer
        for n, threshold in duplicate.items():
            if self._covered(self._repeated(n), n) > threshold * self._total:
                return f"too many characters in duplicate {n}-grams"
        return None

    def _hashes(self, n: int) -> np.ndarray:
        count = max(len(self._codes) - n + 1, 0)
        found = self._codes[:count].copy()
        for at in range(1, n):
            found *= _STEP
            found += self._codes[at : at + count]
        return found

    def _longest(self, n: int) -> int:
        """Characters of the longest run of n words."""
        return int((self._chars[n:] - self._chars[:-n]).max())

    def _most_frequent(self, n: int, enough: float) -> tuple[int, int]:
        """How often the most frequent run occurs, and the characters of all its occurrences (of several the longest), 0
        when that is surely not more than enough."""
        hashes = self._hashes(n)
        ordered = np.sort(hashes)
        (ends,) = np.nonzero(ordered[1:] != ordered[:-1])
        ends = np.concatenate(([-1], ends, [len(ordered) - 1]))
        counts = ends[1:] - ends[:-1]
        most = int(counts.max())
        if most < 2 or most * self._longest(n) <= enough:
            return most, 0
        places = np.flatnonzero(np.isin(hashes, ordered[ends[1:][counts == most]]))
        return most, most * int((self._chars[places + n] - self._chars[places]).max())

    def _repeated(self, n: int) -> np.ndarray:
        """Where runs begin that have occurred before. Hash and place share a number, so that one sort will do."""
        hashes = self._hashes(n)
        bits = np.uint64(len(hashes).bit_length())
        packed = np.sort(((hashes >> bits) << bits) | np.arange(len(hashes), dtype=np.uint64))
        same = ((packed[1:] ^ packed[:-1]) >> bits) == 0
        return (packed[1:][same] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)

    def _covered(self, places: np.ndarray, n: int) -> int:
        """Characters of the words in runs of n words that begin at some places."""
        count = len(self._codes)
        steps = np.bincount(places, minlength=count + 1) - np.bincount(
            np.minimum(places + n, count), minlength=count + 1
        )
        inside = np.cumsum(steps[:-1]) > 0
        return int(self._lengths[inside].sum())
