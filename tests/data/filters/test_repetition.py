"""repetition: each of Gopher's rules takes out what it is for, against a plain count, and running text stays."""

from __future__ import annotations

import pydoc_data.topics
import random
from collections import Counter
from typing import Any

import pytest

from llmkit.data.filters import build_filters
from llmkit.errors import RecipeError

OFF: dict[str, Any] = {
    **dict.fromkeys(("duplicate_lines", "duplicate_line_chars", "duplicate_paragraphs", "duplicate_paragraph_chars")),
    **{f"top_{n}_gram": None for n in (2, 3, 4)},
    **{f"duplicate_{n}_grams": None for n in range(5, 11)},
}
TEXT = " ".join(f"word{number}" for number in range(400))


def judge(text: str, **options: Any) -> Any:
    ((_, take_out),) = build_filters([{"repetition": options}])
    row = {"text": text}
    result = take_out(row)
    return None if result is row else result


def top_share(words: list[str], n: int) -> float:
    """Characters in the most frequent run of n words, of all: what the paper says, counted plainly."""
    runs = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    most = max(runs.values(), default=0)
    if most < 2:
        return 0.0
    return most * max(sum(map(len, run)) for run, count in runs.items() if count == most) / sum(map(len, words))


def duplicate_share(words: list[str], n: int) -> float:
    """Characters of words in runs that occurred before, of all."""
    seen: set[tuple[str, ...]] = set()
    inside = [False] * len(words)
    for at in range(len(words) - n + 1):
        run = tuple(words[at : at + n])
        if run in seen:
            inside[at : at + n] = [True] * n
        seen.add(run)
    return sum(len(word) for word, yes in zip(words, inside, strict=True) if yes) / max(sum(map(len, words)), 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("}\n" * 4 + "\n".join(f"call{n}(with{n}, and{n})" for n in range(7)), None),
        ("}\n" * 5 + "\n".join(f"call{n}(with{n}, and{n})" for n in range(7)), "too many duplicate lines"),
        (
            ("a much longer line that is repeated once, and so weighs more\n" * 2) + "\n".join("abcdefgh"),
            "too many characters in duplicate lines",
        ),
        ("one\n\ntwo\n\none\n\none\n\n3", "too many duplicate lines"),
        ("spam ham " * 30, "too many characters in the most frequent 2-gram"),
    ],
)
def test_text_that_repeats_itself_goes(text: str, reason: str | None) -> None:
    assert judge(text) == reason


def test_paragraphs_have_rules_of_their_own() -> None:
    text = "\n\n".join(["one two", "one two", "three"])
    assert judge(text, **{**OFF, "duplicate_paragraphs": 0.3}) == "too many duplicate paragraphs"
    assert judge(text, **{**OFF, "duplicate_paragraph_chars": 0.3}) == "too many characters in duplicate paragraphs"
    assert judge(text, **{**OFF, "duplicate_paragraphs": 0.5}) is None


@pytest.mark.parametrize("n", range(2, 11))
def test_the_shares_are_those_of_a_plain_count(n: int) -> None:
    share, option = (top_share, f"top_{n}_gram") if n < 5 else (duplicate_share, f"duplicate_{n}_grams")
    draw = random.Random(n)
    for size in (0, 1, n - 1, n, n + 1, 40, 200):
        for vocabulary in (1, 2, 5, 30):
            words = [draw.choice("abcdefgh") * draw.randint(1, 9) for _ in range(vocabulary)]
            drawn = draw.choices(words, k=size)
            true = share(drawn, n)
            for threshold in (0.0, max(min(true, 1.0) - 1e-9, 0.0), min(true + 1e-9, 1.0)):
                expected = true > threshold
                assert (judge(" ".join(drawn), **{**OFF, option: threshold}) is not None) == expected, (drawn, true)


def test_all_duplicate_rules_together_are_the_rules_one_by_one() -> None:
    draw = random.Random(1)
    for _ in range(200):
        words = draw.choices("abcdefghijklmnopqrstuvwxyz", k=60)
        words += words[: draw.randint(0, 20)] + draw.choices("abcdefghijklmnopqrstuvwxyz", k=60)
        allowed = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1}
        broken = [n for n, most in allowed.items() if duplicate_share(words, n) > most]
        options = {**OFF, **{f"duplicate_{n}_grams": most for n, most in allowed.items()}}
        expected = f"too many characters in duplicate {broken[0]}-grams" if broken else None
        assert judge(" ".join(words), **options) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one",
        "one one",
        TEXT,
        TEXT + "\n" + TEXT[:300],
        "吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。",
    ],
)
def test_text_that_does_not_repeat_itself_stays(text: str) -> None:
    assert judge(text) is None


def test_documentation_mostly_stays() -> None:
    topics = list(pydoc_data.topics.topics.values())
    assert sum(judge(text) is None for text in topics) > 0.9 * len(topics)


def test_thresholds_are_shares() -> None:
    with pytest.raises(RecipeError) as caught:
        build_filters([{"repetition": {"top_2_gram": 1.5}}])
    assert caught.value.got == "top_2_gram is 1.5, not a share from 0 to 1"
