"""Arrays: one job for each of several seeds, folds, or values of a recipe key, and for all combinations of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from llmkit.errors import UsageError
from llmkit.recipe.load import Override, parse_set

_LONGEST_NAME = 80


@dataclass(frozen=True)
class Point:
    """One of an array: its name, and what it changes in the recipe."""

    name: str
    changes: tuple[Override, ...]


def points(arrays: Sequence[str]) -> list[Point]:
    """All combinations of `seed=1-5`, `fold=5` and `finetune.lr=1e-5,2e-5`. Raises UsageError."""
    found = [
        Point("_".join(name for name, _ in chosen), tuple(change for _, change in chosen))
        for chosen in product(*map(_values, arrays))
    ]
    keys = [change.key for change in found[0].changes]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise UsageError(f"`{twice[0]}` is given twice", got=" and ".join(arrays), where="--array")
    names = [point.name[:_LONGEST_NAME] for point in found]
    clear = len({*names}) == len(names)
    return [
        Point(name if clear else f"{number:03}_{name}", point.changes)
        for number, (name, point) in enumerate(zip(names, found, strict=True))
    ]


def _values(text: str) -> list[tuple[str, Override]]:
    """Each value of one key, with a name that a folder can have."""
    key, equals, listed = text.partition("=")
    if not equals or not key.strip() or not listed.strip():
        raise UsageError(
            "--array takes KEY=VALUE,VALUE,...",
            got=text,
            expected="seed=1-5, fold=5, or any recipe key, such as finetune.lr=1e-5,2e-5",
            where="--array",
        )
    values = parse_set(f"{key}=[{listed}]").value
    if key == "seed":
        values = [number for value in values for number in _seeds(value)]
    if key == "fold":
        key, values = "data.fold", _folds(values)
    known: list[Any] = []
    for value in values:
        if value in known:
            raise UsageError(f"`{value}` stands twice", got=text, expected="each value once", where="--array")
        known.append(value)
    return [(_name(key, value), Override(key, value, f"--array {text}")) for value in values]


def _seeds(value: Any) -> Sequence[Any]:
    """`1-5` as five seeds; what is no range, as it is."""
    match = re.fullmatch(r"(\d{1,9})-(\d{1,9})", value) if isinstance(value, str) else None
    if match is None:
        return [value]
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + 10_000:
        raise UsageError("no range of seeds", got=value, expected="for example seed=1-5", where="--array")
    return range(first, last + 1)


def _folds(values: list[Any]) -> list[str]:
    """`5` as `1/5` to `5/5`."""
    if len(values) == 1 and type(values[0]) is int and 2 <= values[0] <= 1000:
        return [f"{number}/{values[0]}" for number in range(1, values[0] + 1)]
    raise UsageError(
        "fold takes the number of folds", got=values, expected="for example --array fold=5", where="--array"
    )


def _name(key: str, value: Any) -> str:
    """`finetune.lr` and 1e-5 as `lr-1e-05`."""
    shown = str(value).split("/")[0] if key == "data.fold" else str(value)
    return f"{key.rpartition('.')[2]}-{re.sub(r'[^A-Za-z0-9.]+', '-', shown).strip('-.') or 'none'}"
