"""Takes out, or masks, words and phrases of a list."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from llmkit.data.filters import map_texts
from llmkit.data.filters.words import UNSPACED
from llmkit.data.specs import needed

_MASK = "<BLOCKED>"


class BlockListFilter:
    """Drops rows with more than `max` of the words, or masks the words as `<BLOCKED>`, which are counted.

    Words and phrases are those of `words` and the lines of `file`; they are found as whole words in any case, and, in
    scripts without spaces (Chinese, Japanese, Thai, ...), anywhere. All are looked for in one pass (Aho and Corasick,
    1975). Raises ValueError when there are none, or no such file, and RecipeError when pyahocorasick is missing.
    """

    def __init__(
        self,
        words: list[str] | None = None,
        file: str | None = None,
        action: Literal["drop", "mask"] = "drop",
        max: int = 0,
    ) -> None:
        listed = [*(words or ()), *(_read(file) if file is not None else ())]
        listed = [word for word in map(str.strip, listed) if word]
        if not listed:
            raise ValueError("neither `words` nor `file` has a word")
        if max < 0:
            raise ValueError(f"max is {max}, less than 0")
        if max and action == "mask":
            raise ValueError("max is for the action `drop`: masking masks all")
        try:
            import ahocorasick
        except ImportError:
            raise needed("filter", "block_list", "pyahocorasick") from None
        self._automaton = ahocorasick.Automaton()
        for word in listed:
            for form in ("NFC", "NFD"):
                key = unicodedata.normalize(form, word).casefold()
                self._automaton.add_word(key, len(key))
        self._automaton.make_automaton()
        self.action = action
        self.max = max
        self.counts: Counter[str] = Counter()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, masked if so wanted, or the reason, which does not name the words."""
        found = 0

        def mask(text: str) -> str:
            nonlocal found
            spans = list(self._spans(text))
            found += len(spans)
            return _masked(text, spans) if self.action == "mask" else text

        masked = map_texts(row, mask, deep=True)
        if self.action == "mask":
            if found:
                self.counts["words"] += found
            return masked
        return "words of the block list" if found > self.max else row

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Where words of the list stand, of overlapping ones the first and longest."""
        folded = text.casefold()
        found = []
        for last, length in self._automaton.iter(folded):
            start, end = last + 1 - length, last + 1
            if _whole(folded, start, end):
                found.append((start, -end))
        if not found:
            return
        origin = range(len(text) + 1) if len(folded) == len(text) else _origins(text)
        reached = 0
        for start, end in sorted(found):
            if start >= reached:
                reached = -end
                yield origin[start], origin[reached]


def _read(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ValueError(f"there is no file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the file {file} cannot be read as UTF-8 text: {error}") from None


def _whole(text: str, start: int, end: int) -> bool:
    """True when no word goes on beyond the ends of a span."""
    before, after = text[start - 1 : start], text[end : end + 1]
    return not (_joined(before, text[start]) or _joined(text[end - 1], after))


def _joined(left: str, right: str) -> bool:
    """True when two neighbouring characters are of one word."""
    if not left or not right or not _is_letter(left) or not _is_letter(right):
        return False
    return not (UNSPACED.match(left) and UNSPACED.match(right))


def _is_letter(character: str) -> bool:
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def _origins(text: str) -> list[int]:
    """For each place of the case-folded text, which can be longer, that in the text."""
    origins = [at for at, character in enumerate(text) for _ in character.casefold()]
    return [*origins, len(text)]


def _masked(text: str, spans: list[tuple[int, int]]) -> str:
    parts = []
    reached = 0
    for start, end in spans:
        parts += [text[reached:start], _MASK]
        reached = end
    return "".join([*parts, text[reached:]])
