"""Augmentations: random changes to training rows, so that a model does not learn them by heart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmkit.data.own_code import OwnCode
from llmkit.data.specs import build_all, files_of_specs

_EXAMPLE = "{typos: {rate: 0.05}}"


class Augmentation(Protocol):
    """What an augmentation is: a pure function of what it is given and of the generator's state.

    With `on_tokens` it is called with an encoded example, the generator and the tokenizer, else with a canonical row and
    the generator; it gives back the same or a changed copy.
    """

    on_tokens: bool = False

    def __call__(self, row: dict[str, Any], random: np.random.Generator, /) -> dict[str, Any]:
        """The row, changed or not."""
        ...


def build_augmentations(specs: Sequence[str | Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, Augmentation]]:
    """The augmentations that a recipe names, in its order, with options as filters have them.

    `path.py:name` is the user's own: a function, or a class with options, of a row and a generator, that gives back a row;
    a class with `on_tokens = True` is called with an example, the generator and the tokenizer. Raises RecipeError, with
    every mistake there is.
    """
    return build_all("augmentation", specs, "data.augment", _EXAMPLE, _OwnAugmentation)


def augmentation_files(specs: Sequence[str | Mapping[str, Mapping[str, Any]]]) -> list[Path]:
    """The files whose content decides what the augmentations do."""
    return files_of_specs(specs)


class _OwnAugmentation:
    """An augmentation of the user's own."""

    def __init__(self, code: OwnCode) -> None:
        self._code = code
        self.on_tokens = bool(getattr(code.found, "on_tokens", False))

    def __call__(self, row: dict[str, Any], *inputs: Any) -> dict[str, Any]:
        changed = self._code(row, *inputs)
        if not self.on_tokens:
            return self._code.checked_row(changed, row, "a row")
        if not isinstance(changed, dict) or changed.keys() != row.keys():
            raise self._code.wrong("something else", "an example with the keys of the one that it was given")
        return changed
