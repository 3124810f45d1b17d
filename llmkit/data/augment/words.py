"""Noise on words: some are left out, some change places. Two of the operations of EDA (Wei and Zou, 2019)."""

from __future__ import annotations

import re

import numpy as np

from llmkit.data.augment.noise import TextNoise

_WORD = re.compile(r"\S+")


class WordDeletion(TextNoise):
    """Leaves each word out with a probability of `rate`; line breaks stay."""

    def __init__(self, rate: float = 0.1, share: float = 1.0) -> None:
        super().__init__(rate, share)

    def change(self, text: str, random: np.random.Generator) -> str:
        """The text without some of its words."""
        words = list(_WORD.finditer(text))
        parts = []
        reached = 0
        for word, dropped in zip(words, random.random(len(words)) < self.rate, strict=True):
            if dropped:
                parts.append(text[reached : word.start()])
                after = text[word.end() : word.end() + 1]
                reached = word.end() + (after == " ")
        return "".join([*parts, text[reached:]])


class WordSwap(TextNoise):
    """Lets about `rate` of the words change places with a neighbour; the white space between them stays."""

    def __init__(self, rate: float = 0.1, share: float = 1.0) -> None:
        super().__init__(rate, share)

    def change(self, text: str, random: np.random.Generator) -> str:
        """The text with some words swapped."""
        words = _WORD.findall(text)
        swaps = random.random(len(words)) < self.rate / (2 - self.rate)  # a swap moves two words, and skips one draw
        at = 0
        while at < len(words) - 1:
            if swaps[at]:
                words[at], words[at + 1] = words[at + 1], words[at]
                at += 1
            at += 1
        left = iter(words)
        return _WORD.sub(lambda _: next(left), text)
