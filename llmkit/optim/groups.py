"""What the optimizers do with the parameter groups that they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def own_groups(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies that an optimizer may add its keys to; the tensors are the same."""
    return [dict(group, params=list(group["params"])) for group in groups]


def all_on(groups: Iterable[Mapping[str, Any]], *devices: str) -> bool:
    """True when every parameter is on one of these kinds of device (`cpu`, `cuda`)."""
    return all(parameter.device.type in devices for group in groups for parameter in group["params"])
