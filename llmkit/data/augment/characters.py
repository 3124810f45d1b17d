"""Noise on characters: case, and slips of fingers on a keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from llmkit.data.augment.noise import TextNoise

_WORD = re.compile(r"\S+")
_CASES: tuple[Callable[[str], str], ...] = (str.lower, str.upper, str.capitalize)
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # of keys; each begins half a key further to the right


class CaseNoise(TextNoise):
    """Writes each word in another case, with a probability of `rate`: lower, UPPER or Capitalised."""

    def __init__(self, rate: float = 0.1, share: float = 1.0) -> None:
        super().__init__(rate, share)

    def change(self, text: str, random: np.random.Generator) -> str:
        """The text with some words in another case."""

        words = _WORD.findall(text)
        for at in np.flatnonzero(random.random(len(words)) < self.rate):
            others = [other for case in _CASES if (other := case(words[at])) != words[at]]
            words[at] = others[int(random.integers(len(others)))] if others else words[at]
        left = iter(words)
        return _WORD.sub(lambda _: next(left), text)


class Typos(TextNoise):
    """Makes a slip at each letter, with a probability of `rate`: the key beside it, none, twice, or too early.

    Keys are those of a QWERTY keyboard; letters that it does not have are only dropped, doubled and swapped.
    """

    def __init__(self, rate: float = 0.03, share: float = 1.0) -> None:
        super().__init__(rate, share)
        self._neighbours = _neighbours()

    def change(self, text: str, random: np.random.Generator) -> str:
        """The text with some slips."""
        characters = list(text)
        for at in np.flatnonzero(random.random(len(characters)) < self.rate):
            if characters[at].isalpha():
                self._slip(characters, int(at), int(random.integers(4)), random)
        return "".join(characters)

    def _slip(self, characters: list[str], at: int, kind: int, random: np.random.Generator) -> None:
        letter = characters[at]
        beside = self._neighbours.get(letter.lower(), "")
        follows = at + 1 < len(characters) and characters[at + 1].isalpha()
        if kind == 0 and beside:
            key = beside[int(random.integers(len(beside)))]
            characters[at] = key.upper() if letter.isupper() else key
        elif kind == 1:
            characters[at] = ""
        elif kind == 2 and follows:
            characters[at], characters[at + 1] = characters[at + 1], letter
        else:
            characters[at] = letter * 2


def _neighbours() -> dict[str, str]:
    """For each letter, those on the keys beside, above and below it."""
    places = {letter: (at + row / 2, row) for row, letters in enumerate(_ROWS) for at, letter in enumerate(letters)}
    return {
        letter: "".join(
            other
            for other, (right, down) in places.items()
            if other != letter and abs(down - places[letter][1]) <= 1 and abs(right - places[letter][0]) <= 1
        )
        for letter in places
    }
