"""What augmentations of text have in common: how many rows, which of their texts, and how much of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class TextNoise(ABC):
    """Changes `rate` of the parts of a text, in `share` of the rows: of conversations only what users say.

    What assistants answer is learnt and what the system says is given, so both stay, as do labels. A text that would
    become blank stays too. Raises ValueError for rates and shares that are none.
    """

    on_tokens = False

    def __init__(self, rate: float, share: float) -> None:
        for name, value in (("rate", rate), ("share", share)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}, not above 0 and at most 1")
        self.rate = rate
        self.share = share

    def __call__(self, row: dict[str, Any], random: np.random.Generator) -> dict[str, Any]:
        """The row, or a changed copy of it."""
        if random.random() >= self.share:
            return row
        if "messages" not in row:
            return {**row, "text": self._changed(row["text"], random)}
        messages = [
            {**message, "content": self._changed(message["content"], random)} if message["role"] == "user" else message
            for message in row["messages"]
        ]
        return {**row, "messages": messages}

    def _changed(self, text: str, random: np.random.Generator) -> str:
        changed = self.change(text, random)
        return changed if changed.strip() else text

    @abstractmethod
    def change(self, text: str, random: np.random.Generator) -> str:
        """The text, with noise."""
