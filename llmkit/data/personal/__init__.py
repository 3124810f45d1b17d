"""Personal data in text: where it stands. Finders give spans, and never say what is in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Span = tuple[int, int]


def holds(check: Callable[..., Any], *values: Any) -> bool:
    """What a library says of a value; an error means no, and must not be shown, as it would show the value."""
    try:
        return bool(check(*values))
    except Exception:
        return False
