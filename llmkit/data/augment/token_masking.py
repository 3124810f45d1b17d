"""Puts the mask token in place of tokens that are read but not learnt."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmkit.errors import RecipeError


class TokenMasking:
    """Masks each token that is neither supervised nor special with a probability of `rate`, in `share` of the examples.

    The mask is the tokenizer's mask token, or else its unknown token. In plain text every token is supervised, so that
    none is masked. Raises ValueError for a rate or share that is none.
    """

    on_tokens = True

    def __init__(self, rate: float = 0.15, share: float = 1.0) -> None:
        for name, value in (("rate", rate), ("share", share)):
            if not 0 < value <= 1:
                raise ValueError(f"{name} is {value}, not above 0 and at most 1")
        self.rate = rate
        self.share = share

    def __call__(self, example: dict[str, Any], random: np.random.Generator, tokenizer: Any) -> dict[str, Any]:
        """The example, or a changed copy. Raises RecipeError when the tokenizer has no token to mask with."""
        mask = tokenizer.unk_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id
        if mask is None:
            raise RecipeError(
                "the augmentation `token_masking` has no token to mask with",
                got="a tokenizer with neither a mask token nor an unknown token",
                hint="use `word_deletion` in its place",
                where="data.augment",
            )
        if random.random() >= self.share:
            return example
        ids = np.array(example["input_ids"])
        open_to = ~np.isin(ids, tokenizer.all_special_ids)
        if "supervised" in example:
            open_to &= ~np.asarray(example["supervised"], bool)
        ids[open_to & (random.random(len(ids)) < self.rate)] = mask
        return {**example, "input_ids": ids}
