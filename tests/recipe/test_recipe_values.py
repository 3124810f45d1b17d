"""The small notations of a recipe."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.recipe.values import (
    count_of,
    duration_or_steps,
    is_share,
    rate_or_auto,
    seconds_of,
    share,
    share_or_count,
)


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), (" 2.5 % ", 0.025), ("0%", 0.0), ("100%", 1.0)])
def test_shares(text: str, value: float) -> None:
    assert is_share(text)
    assert share(text) == value


@pytest.mark.parametrize("text", ["101%", "5", "%", "-1%", "five%", "5%%", ""])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError, match="share"):
        share(text)


@pytest.mark.parametrize(("value", "count"), [("3%", 6), ("1%", 2), ("0%", 0), ("0.4%", 0), (7, 7), (0, 0)])
def test_a_count_of_200(value: str | int, count: int) -> None:
    assert count_of(share_or_count(value), 200) == count


@pytest.mark.parametrize("value", [-1, True, 1.5, "120%", "many", None])
def test_what_is_neither_share_nor_count(value: Any) -> None:
    with pytest.raises(ValueError, match="share"):
        share_or_count(value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10min", 600), ("1.5h", 5400), ("2 min", 120), ("5sec", 5)]
)
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(str(duration_or_steps(text))) == seconds


@pytest.mark.parametrize("value", [0, -5, True, "10", "10 parsecs", "min", None, 1.5])
def test_what_is_neither_time_nor_steps(value: Any) -> None:
    with pytest.raises(ValueError, match="time"):
        duration_or_steps(value)


@pytest.mark.parametrize(("value", "rate"), [("auto", "auto"), (1, 1.0), (2e-5, 2e-5)])
def test_rates(value: Any, rate: Any) -> None:
    assert rate_or_auto(value) == rate


@pytest.mark.parametrize("value", [0, -1e-5, float("nan"), float("inf"), True, "fast", "1e-5", None])
def test_what_is_no_rate(value: Any) -> None:
    with pytest.raises(ValueError, match="number above 0"):
        rate_or_auto(value)
