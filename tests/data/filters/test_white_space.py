"""white_space: what becomes plain, what stays, and that a second pass changes nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llmkit.data.filters import build_filters


def plain(text: str, **options: Any) -> Any:
    ((_, make),) = build_filters([{"white_space": options}])
    result = make({"text": text})
    return result["text"] if isinstance(result, dict) else result


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a  b \t c", "a b\tc"),
        ("end   \nof\t\nline ", "end\nof\nline"),
        ("a\n\n\n\n\nb", "a\n\nb"),
        ("\n\n  a\n\n", "  a\n"),
        ("\ufeffzero\u200b width\u00ad", "zero width"),
        ("bell\x07 nul\x00", "bell nul"),
        ("no\u00a0break\u3000wide", "no break wide"),
        ("form\x0cfeed", "form\nfeed"),
        ("a\u200db", "ab"),
        ("def f():\n\t\treturn 1  # x\n    y\n", "def f():\n\t\treturn 1 # x\n    y\n"),
        (" \u200b \n", "no text is left"),
    ],
)
def test_it_makes_plain(text: str, expected: str) -> None:
    assert plain(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return {\n        1: 2,\n    }\n",
        "می\u200cخواهم",
        "👨\u200d👩\u200d👧",
        "क्\u200dष",
        "col\tcol\n1\t2",
        "猫。\n\n犬。",
    ],
)
def test_it_leaves_alone(text: str) -> None:
    ((_, make),) = build_filters(["white_space"])
    row = {"text": text}
    assert make(row) is row
    assert not make.counts


def test_indentation_can_go() -> None:
    assert plain("  a\n\t b", keep_indentation=False) == "a\nb"


@pytest.mark.parametrize("options", [{}, {"keep_indentation": False}])
def test_a_second_pass_changes_nothing(options: dict[str, Any]) -> None:
    pieces = [
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\x0b",
        "\u200b",
        "\u200d",
        "\u200c",
        "\ufeff",
        "\u00a0",
        "\x00",
        "a",
        "é",
        "猫",
        "👩",
    ]
    draw = random.Random(5)
    ((_, make),) = build_filters([{"white_space": options}])
    for _ in range(3000):
        once = make({"text": "".join(draw.choices(pieces, k=draw.randint(1, 12)))})
        if isinstance(once, dict):
            assert make(once) is once


def test_texts_are_counted() -> None:
    ((_, make),) = build_filters(["white_space"])
    for text in ("a  b", "a b", "a \nb"):
        make({"text": text})
    assert make.counts == {"texts": 2}


def test_a_turn_that_becomes_blank_takes_the_row_out() -> None:
    ((_, make),) = build_filters(["white_space"])
    turns = [{"role": "user", "content": "\u200b"}, {"role": "assistant", "content": "x"}]
    assert make({"messages": turns}) == "no text is left"
    called = [*turns[1:], {"role": "assistant", "content": "\u200b", "tool_calls": [{}]}]
    assert isinstance(make({"messages": called}), dict)
