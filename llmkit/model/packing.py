"""Examples one after the other in one row; what all of them begin with is there only once.

In a causal model a token depends on what stands before it alone, so a common beginning (a system prompt, an instruction)
has the same hidden states in every example. They are computed once, and the gradients of all examples add up in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

_WORTH_SHARING = 8  # tokens
_MOST_FILLING = 0.03  # of the tokens


@dataclass(frozen=True)
class Pack:
    """Rows of token ids as one; `shared` tokens at its beginning belong to all of them.

    `lengths` are those of the segments: the shared beginning, where there is one, what is each example's own, and tokens
    that fill up, where there are any.
    """

    ids: np.ndarray  # (T,)
    lengths: list[int]
    shared: int
    offsets: list[int]  # of each example: where its token t lies, less t, when t is not shared

    def places(self, example: int, tokens: np.ndarray) -> np.ndarray:
        """Where tokens of an example lie in the row."""
        return tokens + np.where(tokens < self.shared, 0, self.offsets[example])

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """What a model is given: ids, positions, and where segments begin and end, as Transformers names it."""
        begins = [0, *([self.shared] * (len(self.lengths) - 1))]
        segments = zip(begins, self.lengths, strict=True)
        positions = torch.cat([torch.arange(begin, begin + length, device=device) for begin, length in segments])[None]
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        longest = max(self.lengths)
        inputs = {
            "input_ids": torch.from_numpy(self.ids[None]).to(device),
            "position_ids": positions,
            "attention_mask": torch.ones_like(
                positions
            ),  # else each forward looks for packed examples in the positions
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return inputs | ({"shared_prefix": self.shared} if self.shared else {})


def pack(rows: Sequence[np.ndarray], *, share: bool, fill: bool = False, multiple: int = 1) -> Pack:
    """Packs rows of token ids; with `share`, a beginning of 8 tokens or more that all have is put first, once.

    With `fill`, a segment that belongs to none, at most 3 % of all, makes the length a multiple of 8, 16 or 32: products
    of such lengths are faster, and kernels that were made for one are used again. It is a multiple of `multiple` in any
    case.
    """
    shared = _common_beginning(rows) if share and len(rows) > 1 else 0
    shared = shared if shared >= _WORTH_SHARING else 0
    own = [row[shared:] for row in rows]
    starts = list(accumulate([shared, *map(len, own)]))
    total = starts.pop()
    filled = next((size for size in (32, 16, 8) if size <= _MOST_FILLING * total), 1) if fill else 1
    multiple = math.lcm(filled, multiple)
    if filling := -total % multiple:
        own.append(np.zeros(filling, np.int64))
    return Pack(
        ids=np.concatenate([rows[0][:shared], *own]).astype(np.int64),
        lengths=[shared] * (shared > 0) + [len(row) for row in own],
        shared=shared,
        offsets=[start - shared for start in starts],
    )


def _common_beginning(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with, at least one less than the shortest has."""
    most = min(map(len, rows)) - 1
    same = np.all([row[:most] == rows[0][:most] for row in rows], axis=0)
    return int(np.argmin(same)) if not same.all() else most
