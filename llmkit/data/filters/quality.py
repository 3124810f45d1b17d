"""Takes out text that is no running text: the rules of Gopher (Rae et al., 2021, https://arxiv.org/abs/2112.11446, A.1.1)."""

from __future__ import annotations

import re
from typing import Any

from llmkit.data.filters import row_text
from llmkit.data.filters.words import split_lines, split_words

_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_BULLET = re.compile(r"[•‣◦▪●·]|[-*+] ")
_LETTER = re.compile(r"[^\W\d_]")


class QualityFilter:
    """Keeps text within the limits of words, symbols and lines (None switches a rule off).

    `max_symbols` holds for `#` and for ellipses, each as a share of the number of words; the other shares are of lines
    and of words. `min_stop_words` is how many of `stop_words` occur (None: the paper's eight English ones). For
    languages without spaces, where characters count as words, switch `min_mean_word_chars` and `min_stop_words` off.
    Raises ValueError for limits that cross.
    """

    def __init__(
        self,
        min_words: int | None = 50,
        max_words: int | None = 100_000,
        min_mean_word_chars: float | None = 3,
        max_mean_word_chars: float | None = 10,
        max_symbols: float | None = 0.1,
        max_bullet_lines: float | None = 0.9,
        max_ellipsis_lines: float | None = 0.3,
        min_alphabetic_words: float | None = 0.8,
        min_stop_words: int | None = 2,
        stop_words: list[str] | None = None,
    ) -> None:
        for least, most, what in (
            (min_words, max_words, "words"),
            (min_mean_word_chars, max_mean_word_chars, "mean_word_chars"),
        ):
            if least is not None and most is not None and most < least:
                raise ValueError(f"max_{what} is {most}, less than min_{what}, {least}")
        self._words = (min_words, max_words)
        self._mean_chars = (min_mean_word_chars, max_mean_word_chars)
        self._symbols = max_symbols
        self._bullets = max_bullet_lines
        self._ellipses = max_ellipsis_lines
        self._alphabetic = min_alphabetic_words
        self._stop_words = frozenset(map(str.lower, _STOP_WORDS if stop_words is None else stop_words))
        self._least_stop_words = min_stop_words
        if min_stop_words is not None and min_stop_words > len(self._stop_words):
            raise ValueError(f"min_stop_words is {min_stop_words}, but there are {len(self._stop_words)} stop_words")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, or the rule that it breaks."""
        text = row_text(row)
        words = split_words(text)
        return self._wrong_words(words) or self._wrong_symbols(text, len(words)) or self._wrong_lines(text) or row

    def _wrong_words(self, words: list[str]) -> str | None:
        count = len(words)
        if reason := _outside(count, self._words, "words"):
            return reason
        if self._mean_chars != (None, None) and count:
            chars = sum(map(len, words))
            if reason := _outside(chars / count, self._mean_chars, "characters a word on average"):
                return reason
        if self._alphabetic is not None and count:
            others = sum(not word.isalpha() and not _LETTER.search(word) for word in words)
            if count - others < self._alphabetic * count:
                return "too few words with a letter"
        if self._least_stop_words:
            found = self._stop_words.intersection(map(str.lower, set(words)))
            if len(found) < self._least_stop_words:
                return "too few stop words"
        return None

    def _wrong_symbols(self, text: str, words: int) -> str | None:
        if self._symbols is None:
            return None
        if text.count("#") > self._symbols * words:
            return "too many `#`"
        if text.count("...") + text.count("…") > self._symbols * words:
            return "too many ellipses"
        return None

    def _wrong_lines(self, text: str) -> str | None:
        lines = split_lines(text) if self._bullets is not None or self._ellipses is not None else []
        bullets = sum(_BULLET.match(line) is not None for line in lines)
        if self._bullets is not None and bullets > self._bullets * len(lines):
            return "too many lines are bullet points"
        if self._ellipses is not None and sum(line.endswith(("...", "…")) for line in lines) > self._ellipses * len(
            lines
        ):
            return "too many lines end with an ellipsis"
        return None


def _outside(value: float, limits: tuple[float | None, float | None], what: str) -> str | None:
    least, most = limits
    if least is not None and value < least:
        return f"fewer than {least} {what}"
    if most is not None and value > most:
        return f"more than {most} {what}"
    return None
