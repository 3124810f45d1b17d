"""block_list: whole words of any script in any case, and nothing that only has them in it."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from llmkit.data.filters import build_filters, filter_files
from llmkit.errors import RecipeError

WORDS = ["foo", "bad word", "猫", "straße", "кот", "é", "c++", "שלום"]


def build(**options: Any) -> Any:
    ((_, take_out),) = build_filters([{"block_list": options}])
    return take_out


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("foo FOO Foo's, (foo)", "<BLOCKED> <BLOCKED> <BLOCKED>'s, (<BLOCKED>)"),
        ("a bad word here", "a <BLOCKED> here"),
        ("黑猫坐", "黑<BLOCKED>坐"),
        ("STRASSE Straße", "<BLOCKED> <BLOCKED>"),
        ("КОТ и", "<BLOCKED> и"),
        ("e\u0301 É", "<BLOCKED> <BLOCKED>"),
        ("C++!", "<BLOCKED>!"),
        ("ﬀß foo ß", "ﬀß <BLOCKED> ß"),
        ("😀foo😀 שלום", "😀<BLOCKED>😀 <BLOCKED>"),
    ],
)
def test_words_of_the_list_are_masked(text: str, masked: str) -> None:
    take_out = build(words=WORDS, action="mask")
    once = take_out({"text": text})
    assert once == {"text": masked}
    assert take_out(once) is once
    assert build(words=WORDS)({"text": text}) == "words of the block list"


@pytest.mark.parametrize(
    "text",
    [
        "food foo_bar barfoo foo1",
        "badword",
        "коты",
        "café cafe\u0301",
        "https://x.org/foobar",
        "c+",
        "犬",
        "הש\u05dcום",
        "",
    ],
)
def test_parts_of_words_stay(text: str) -> None:
    row = {"text": text}
    assert build(words=WORDS, action="mask")(row) is row
    assert build(words=WORDS)(row) is row


def test_some_may_be_allowed() -> None:
    take_out = build(words=["foo"], max=2)
    assert isinstance(take_out({"text": "foo foo"}), dict)
    assert take_out({"text": "foo foo foo"}) == "words of the block list"


def test_words_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("\ufefffoo\n\n  two words \n", encoding="utf-8")
    spec: Any = {"block_list": {"file": str(file), "words": ["x"], "action": "mask"}}
    ((_, take_out),) = build_filters([spec])
    assert take_out({"text": "foo x two words"}) == {"text": "<BLOCKED> <BLOCKED> <BLOCKED>"}
    assert take_out.counts == {"words": 3}
    assert filter_files(["length", spec]) == [file]


def test_calls_of_tools_are_looked_through_and_roles_are_not() -> None:
    call = {"function": {"name": "f", "arguments": {"q": "foo"}}}
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    masked = build(words=["foo", "user"], action="mask")(row)
    assert masked["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"q": "<BLOCKED>"}
    assert masked["messages"][0] == row["messages"][0]
    assert call["function"]["arguments"] == {"q": "foo"}  # type: ignore[index]


def test_many_words_are_those_of_a_plain_search() -> None:
    draw = random.Random(3)
    words = ["".join(draw.choices("abc", k=draw.randint(1, 6))) for _ in range(300)]
    take_out = build(words=words, action="mask")
    for _ in range(200):
        text = " ".join("".join(draw.choices("abc", k=draw.randint(1, 8))) for _ in range(10))
        expected = re.sub(r"\w+", lambda word: "<BLOCKED>" if word[0] in set(words) else word[0], text)
        assert take_out({"text": text})["text"] == expected


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({}, "neither `words` nor `file` has a word"),
        ({"words": [" "]}, "neither `words` nor `file` has a word"),
        ({"file": "no/such.txt"}, "there is no file no/such.txt"),
        ({"words": ["x"], "max": -1}, "max is -1, less than 0"),
        ({"words": ["x"], "max": 1, "action": "mask"}, "max is for the action `drop`: masking masks all"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], got: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build(**options)
    assert caught.value.problems[0].got == got


def test_a_misspelt_action_is_told_with_the_right_one() -> None:
    with pytest.raises(RecipeError) as caught:
        build(words=["x"], action="masks")
    assert caught.value.expected == "one of drop, mask"
    assert caught.value.hint == "did you mean `mask`?"
