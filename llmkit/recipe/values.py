"""The small notations of a recipe: `3%`, `10min`, a number with a percent sign or a unit."""

from __future__ import annotations

import math
import re
from typing import Literal

_SHARE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*%\s*$")
_DURATION = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h)\s*$")
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(B|[kMGT]B|[KMGT]iB)?\s*$")
_UNITS = {"B": 1} | {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)}
_SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}


def is_share(value: object) -> bool:
    """True for text such as `5%`."""
    return isinstance(value, str) and _SHARE.match(value) is not None


def share(value: str) -> float:
    """`5%` as 0.05. Raises ValueError for anything else or for more than 100 %."""
    match = _SHARE.match(value)
    if match is None or float(match[1]) > 100:
        raise ValueError("should be a share from 0% to 100%, such as `5%`")
    return float(match[1]) / 100


def share_or_count(value: object) -> str | int:
    """Checks a value that is either a share (`3%`) or a whole number of things; returns it as it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and is_share(value):
        share(value)
        return value
    raise ValueError("should be a share such as `3%` or a whole number that is not negative")


def rate_or_auto(value: object) -> float | Literal["auto"]:
    """Checks a learning rate: a number above 0, or `auto`."""
    if value == "auto":
        return "auto"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ValueError("should be a number above 0 such as `2e-5`, or `auto`")


def bytes_or_auto(value: object) -> int | str:
    """Checks a size: a whole number of bytes above 0, text such as `20GB` or `512MiB`, or `auto`."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and (value == "auto" or _BYTES.match(value)):
        return value
    raise ValueError("should be a size such as `20GB` or `512MiB`, a number of bytes above 0, or `auto`")


def bytes_of(value: str | int) -> int:
    """`20GB` as 20,000,000,000 bytes."""
    match = _BYTES.match(str(value))
    if match is None:
        raise ValueError("should be a size such as `20GB`")
    return int(float(match[1]) * _UNITS[match[2] or "B"])


def count_of(value: str | int, total: int) -> int:
    """How many of `total` a share or count means; a share is rounded down."""
    return int(share(value) * total + 1e-9) if isinstance(value, str) else value  # 29 % of 100 are 29


def duration(value: object) -> str:
    """Checks a time (`10min`, `90s`, `1h`); returns it as it is."""
    if isinstance(value, str) and _DURATION.match(value):
        return value
    raise ValueError("should be a time such as `10min`, `90s` or `1h`")


def duration_or_steps(value: object) -> str | int:
    """Checks a value that is either a time (`10min`, `90s`, `1h`) or a whole number of steps; returns it as it is."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str) and _DURATION.match(value):
        return value
    raise ValueError("should be a time such as `10min`, `90s` or `1h`, or a number of steps above 0")


def seconds_of(value: str) -> float:
    """`10min` as 600.0 seconds."""
    match = _DURATION.match(value)
    if match is None:
        raise ValueError("should be a time such as `10min`")
    return float(match[1]) * _SECONDS[match[2]]
