"""Which packed segments are attended together, and who sees whom among them.

Short segments one by one cost more in calls than in arithmetic; together, a mask of their own size keeps them apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

_TOGETHER = 256  # tokens; of 128 to 512 none was clearly better on two cores
_LONGEST_KEPT = 1024  # keys of a mask that is kept for the next layer


def groups(lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """From and to which segment: as many as have 256 tokens together, or one that is longer."""
    first = tokens = 0
    for number, length in enumerate(lengths):
        if number > first and tokens + length > _TOGETHER:
            yield first, number
            first, tokens = number, 0
        tokens += length
    yield first, len(lengths)


@dataclass(frozen=True)
class Seen:
    """What the tokens of some segments look at: what is before them in their own segment, and a shared beginning.

    That is the `before` keys which stand in front without queries or, where `shared` is not 0, the first of `lengths`.
    A sliding window counts back from a token's position in its example.
    """

    lengths: tuple[int, ...]
    before: int = 0
    shared: bool = False
    window: int | None = None

    @property
    def plainly_causal(self) -> bool:
        """True when each token sees all that stands before it."""
        return len(self.lengths) == 1 and not self.before and (self.window is None or self.window >= self.lengths[0])

    def bias(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """(L, before + L) for L tokens together: 0 where one looks, else minus infinity."""
        short = self.before + sum(self.lengths) <= _LONGEST_KEPT
        return (_kept_bias if short else _bias)(self, dtype, device)


def _bias(seen: Seen, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    begins = seen.before or (seen.lengths[0] if seen.shared else 0)
    rest = seen.lengths[1:] if seen.shared else seen.lengths
    lengths = torch.tensor([begins, *rest])
    number = torch.arange(len(lengths)).repeat_interleave(lengths)  # of a key's segment; 0 is shared
    starts = torch.cumsum(lengths, 0) - lengths
    place = torch.arange(len(number)) - starts[number] + (number > 0) * begins  # in its example
    queries, places = number[seen.before :, None], place[seen.before :, None]
    looks = ((number == queries) | (number == 0)) & (place <= places)
    if seen.window is not None:
        looks &= places - place < seen.window
    return torch.zeros(looks.shape, dtype=dtype).masked_fill_(~looks, float("-inf")).to(device)


_kept_bias = lru_cache(maxsize=16)(torch.inference_mode(False)(_bias))
