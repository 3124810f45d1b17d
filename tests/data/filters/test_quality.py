"""quality: each of Gopher's rules takes out what it is for, and running text stays."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.data.filters import build_filters
from llmkit.errors import RecipeError

PROSE = "The house that we have seen stands with its back to the river, and all of its windows look out on the hills. "


def judge(text: str, **options: Any) -> Any:
    ((_, take_out),) = build_filters([{"quality": options}])
    row = {"text": text}
    result = take_out(row)
    return None if result is row else result


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (PROSE * 3, None),
        (PROSE * 2, "fewer than 50 words"),
        ("the of a b c d " * 20, "fewer than 3 characters a word on average"),
        ("the of " + "incomprehensibilities " * 60, "more than 10 characters a word on average"),
        (PROSE * 3 + "#hash " * 9, "too many `#`"),
        (PROSE * 3 + "and so on ... " * 12, "too many ellipses"),
        ("\n".join("- " + PROSE for _ in range(10)), "too many lines are bullet points"),
        ("\n".join("• " + PROSE for _ in range(10)), "too many lines are bullet points"),
        ("\n".join("- " + PROSE for _ in range(9)) + "\n" + PROSE, None),
        (
            "\n".join(PROSE.strip() + ending for ending in ("...", "…", "", "", "", "")),
            "too many lines end with an ellipsis",
        ),
        (PROSE * 3 + "12.5 | " * 20, "too few words with a letter"),
        ("Haus Baum Fluss Himmel Straße Wald " * 10, "too few stop words"),
    ],
)
def test_the_rules(text: str, reason: str | None) -> None:
    assert judge(text) == reason


def test_a_rule_can_be_switched_off_and_thresholds_set() -> None:
    assert judge(PROSE, min_words=None) is None
    assert judge(PROSE, min_words=5) is None
    assert judge(PROSE, max_words=10, min_words=1) == "more than 10 words"
    german = "Der Hund und die Katze liegen auf der Bank vor dem Haus, und es regnet nicht. " * 5
    assert judge(german) == "too few stop words"
    assert judge(german, stop_words=["der", "und"]) is None


def test_scripts_without_spaces_are_counted_by_character() -> None:
    chinese = "猫坐在垫子上看着外面的鸟。" * 10
    assert judge(chinese, min_mean_word_chars=None, min_stop_words=None) is None
    assert judge(chinese, min_words=200) == "fewer than 200 words"


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"min_words": 9, "max_words": 3}, "max_words is 3, less than min_words, 9"),
        ({"min_stop_words": 2, "stop_words": ["x"]}, "min_stop_words is 2, but there are 1 stop_words"),
    ],
)
def test_limits_that_cross_are_told(options: dict[str, Any], got: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_filters([{"quality": options}])
    assert caught.value.got == got


def test_a_whole_number_is_a_number() -> None:
    assert judge(PROSE * 3, max_mean_word_chars=8, max_symbols=1) is None
