"""Near duplicates: planted copies of known likeness are found, and texts that are not alike stay."""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from llmkit.data.filters import build_filters
from llmkit.data.filters.near_duplicates import NearDuplicatesFilter
from llmkit.errors import RecipeError

WORDS = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in "aeiou" for c in "bdklmnrst"]


def found_by(take: NearDuplicatesFilter, texts: list[str], cuts: tuple[int, ...] = ()) -> list[int]:
    """For each text the earlier one that it repeats, or -1; the keys lie in parts that end at the cuts."""
    keys = np.array([take.key({"text": text}) for text in texts])
    repeats = take.repeats(np.split(keys, cuts), np.ones(len(texts), bool))
    return [int(number) for number in repeats]


def jaccard(one: str, other: str, words: int = 5) -> float:
    """Counted, without the filter's code."""
    sets = []
    for text in (one, other):
        each = text.split()
        sets.append({tuple(each[at : at + words]) for at in range(len(each) - words + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def changed(chance: random.Random, text: str, places: int) -> str:
    """A copy with some words replaced, dropped or added."""
    words = text.split()
    for _ in range(places):
        at, new = chance.randrange(len(words)), chance.choice(WORDS)
        words[at : at + chance.randint(0, 1)] = [new] * chance.randint(0, 1) or [new, new]
    return " ".join(words)


def planted(count: int) -> tuple[list[str], set[int], set[int]]:
    """Texts, some of which are copies of the first `count`: numbers of those well above and well below 0.8."""
    chance = random.Random(3)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(80, 400))) for _ in range(count)]
    near, far = set(), set()
    for at in range(count):
        copy = changed(chance, texts[at], max(1, len(texts[at].split()) // chance.choice((100, 110, 25, 20))))
        index = jaccard(texts[at], copy)
        if index >= 0.88:
            near.add(len(texts))
        elif index <= 0.72:
            far.add(len(texts))
        else:
            continue
        texts.append(copy)
    return texts, near, far


def test_planted_copies_are_found_and_what_is_less_alike_is_not() -> None:
    texts, near, far = planted(1500)
    assert min(len(near), len(far)) > 300
    repeats = found_by(NearDuplicatesFilter(), texts)
    found = {at for at, first in enumerate(repeats) if first >= 0}
    assert len(found & near) / len(near) >= 0.95, "recall"
    assert len(found & near) / len(found) >= 0.95, "precision"
    assert all(jaccard(texts[at], texts[repeats[at]]) >= 0.88 for at in found & near), "of that text and no other"


@pytest.mark.parametrize("threshold", [0.5, 0.95])
def test_the_threshold_decides(threshold: float) -> None:
    chance = random.Random(5)
    above, below = [], []
    for places in (1, 8, 30, 70, 120) * 40:
        text = " ".join(chance.choices(WORDS, k=800))
        copy = changed(chance, text, places)
        index = jaccard(text, copy)
        if index > threshold + 0.12 or index > 0.98:
            above.append((text, copy))
        elif index < threshold - 0.12:
            below.append((text, copy))
    assert min(len(above), len(below)) >= 30
    take = NearDuplicatesFilter(threshold)
    assert sum(found_by(take, [*pair])[1] == 0 for pair in above) >= 0.95 * len(above)
    assert sum(found_by(take, [*pair])[1] == 0 for pair in below) <= 0.05 * len(below)


def test_the_first_of_a_cluster_stays() -> None:
    """Also of a chain, whose ends are less alike than their neighbours."""
    words = [f"word{i}" for i in range(200)]
    chain = [" ".join([f"new{i}" for i in range(start)] + words[start:]) for start in range(0, 120, 6)]
    assert jaccard(chain[0], chain[-1]) < 0.5
    assert min(jaccard(*pair) for pair in pairwise(chain)) > 0.9
    other = " ".join(f"other{i}" for i in range(50))
    texts = [other, *chain, other, chain[-1]]
    assert found_by(NearDuplicatesFilter(), texts) == [-1, -1, *[1] * 19, 0, 1]
    backwards = [*reversed(chain), other]
    assert found_by(NearDuplicatesFilter(), backwards) == [-1, *[0] * 19, -1]


def test_case_punctuation_and_white_space_do_not_count() -> None:
    text = "The quick brown fox jumps over the lazy dog near the river bank today"
    copies = [text.upper(), text.replace(" ", ", "), f"  {text}!!!", text.replace(" ", "\n\t "), f'"{text}"']
    other = text.replace("fox", "dog").replace("river", "sea").replace("quick", "slow")
    assert found_by(NearDuplicatesFilter(), [text, *copies, other]) == [-1, *[0] * 5, -1]


def test_the_order_of_words_counts() -> None:
    words = [f"word{i}" for i in range(100)]
    assert found_by(NearDuplicatesFilter(), [" ".join(words), " ".join(reversed(words))]) == [-1, -1]
    assert found_by(NearDuplicatesFilter(words=1), [" ".join(words), " ".join(reversed(words))]) == [-1, 0]


SHORT = [
    "Yes.",
    "No.",
    "yes",
    "Yes it is",
    "Yes it is!",
    "Yes it was",
    "a b c d e",
    "a b c d f",
    "A b c d e",
    "a b c d e f",
]


def test_of_short_texts_only_those_of_the_same_words_are_alike() -> None:
    assert found_by(NearDuplicatesFilter(), SHORT) == [-1, -1, 0, -1, 3, -1, -1, -1, 6, -1]


def test_texts_without_words_are_not_alike_unless_they_are_the_same() -> None:
    texts = ["{ }", "+++ ---", "🙂🙂", "...", "+++ ---", "🙂", ""]
    assert found_by(NearDuplicatesFilter(), texts) == [-1, -1, -1, -1, 1, -1, -1]


@pytest.mark.parametrize("cuts", [(1,), (400,), (0, 0, 7, 8, 300, 799), tuple(range(0, 800, 3))])
def test_what_is_found_does_not_depend_on_how_the_keys_are_divided(cuts: tuple[int, ...]) -> None:
    texts, near, _ = planted(450)
    take = NearDuplicatesFilter()
    assert found_by(take, texts, cuts) == found_by(take, texts)
    assert len(near) > 50


def test_rows_that_are_out_already_are_not_compared() -> None:
    text = " ".join(WORDS[:50])
    take = NearDuplicatesFilter()
    keys = np.array([take.key({"text": each}) for each in (text, text, f"{text} more", "else")])
    for alive, found in (
        ([1, 1, 1, 1], [-1, 0, 0, -1]),
        ([0, 1, 1, 1], [-1, -1, 1, -1]),
        ([0, 0, 1, 1], [-1, -1, -1, -1]),
        ([0, 0, 0, 0], [-1, -1, -1, -1]),
    ):
        assert take.repeats([keys[:1], keys[1:]], np.array(alive, bool)).tolist() == found


def test_no_rows_at_all() -> None:
    take = NearDuplicatesFilter()
    assert take.repeats([], np.zeros(0, bool)).tolist() == []
    assert take.repeats([take.none(), take.none()], np.zeros(0, bool)).tolist() == []
    assert found_by(take, ["one text"]) == [-1]


def test_all_text_of_a_conversation_counts_and_nothing_else_does() -> None:
    chat = {
        "messages": [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six"}]
    }
    key = NearDuplicatesFilter().key
    assert key(chat).tolist() == key({"text": "One two three\nfour five six", "label": "x"}).tolist()


@pytest.mark.parametrize("options", [{"threshold": 0.2}, {"threshold": 1.1}, {"words": 0}, {"threshold": "0.8"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        build_filters([{"near_duplicates": options}])
    assert str(caught.value.where).startswith("data.filters[0].near_duplicates")


def test_without_its_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(RecipeError) as caught:
        build_filters(["duplicates", "near_duplicates"])
    assert "pip install" in str(caught.value.hint)
    assert "rensa" in str(caught.value.got)
    assert "data.filters" in str(caught.value.where)
