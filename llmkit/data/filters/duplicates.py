"""Takes out rows that say the same as an earlier one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.data.filters.comparison import Comparison, first_of_equal


class DuplicatesFilter(Comparison):
    """Keeps the first of rows with the same content, label and tools included; compares 16 bytes of BLAKE2b."""

    reason = "the same as an earlier row"

    def key(self, row: dict[str, Any]) -> np.ndarray:
        """The digest of the row, as two numbers."""
        content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        return np.frombuffer(hashlib.blake2b(content.encode("utf-8"), digest_size=16).digest(), np.uint64)

    def none(self) -> np.ndarray:
        """No digests."""
        return np.zeros((0, 2), np.uint64)

    def repeats(self, keys: Sequence[np.ndarray], alive: np.ndarray) -> np.ndarray:
        """The first row with the same digest."""
        numbers = np.flatnonzero(alive)
        firsts = numbers[first_of_equal(np.concatenate([*keys, self.none()])[numbers])]
        found = np.full(len(alive), -1, np.int64)
        found[numbers] = np.where(firsts < numbers, firsts, -1)
        return found
