"""fix_encoding: what it mends, and that right text of any script stays byte for byte."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest

from llmkit.data.filters import build_filters


def fix(text: str, **options: Any) -> Any:
    ((_, mend),) = build_filters([{"fix_encoding": options}])
    return mend({"text": text})


@pytest.mark.parametrize(
    ("broken", "right"),
    [
        ("schÃ¶n", "schön"),
        ("â€œquotedâ€\x9d", "“quoted”"),
        ("Ð¿Ñ€Ð¸Ð²ÐµÑ‚", "привет"),
        ("Itâ€™s\nfine", "It’s\nfine"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("cafe\u0301", "café"),
    ],
)
def test_it_mends(broken: str, right: str) -> None:
    assert fix(broken) == {"text": right}
    assert fix(right) == {"text": right}


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\r\n\treturn x  # ok\n",
        "https://example.org/?q=%C3%A4&amp;x",
        "São Paulo – Ã, naïve café",
        "“curly” ‘quotes’ and ﬁ ﬂ",
        "全角ＡＢＣ、中文。",
        "مرحبا بالعالم",
        "👨\u200d👩\u200d👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "हिन्दी ไทย 한국어",
    ],
)
def test_right_text_is_the_same_row(text: str) -> None:
    ((_, mend),) = build_filters(["fix_encoding"])
    row = {"text": text}
    assert mend(row) is row
    assert not mend.counts


def test_the_unicode_form_is_an_option() -> None:
    assert fix("ＡＢＣ ﬁ", form="NFKC") == {"text": "ABC fi"}
    assert unicodedata.is_normalized("NFC", fix("e\u0301ｱ")["text"])


def test_what_it_changed_is_counted_by_kind() -> None:
    ((_, mend),) = build_filters(["fix_encoding"])
    for text in ("schÃ¶n", "plain", "e\u0301", "Ã¼"):
        mend({"text": text})
    assert mend.counts == {"wrong encoding": 2, "Unicode form": 1}


def test_every_message_of_a_conversation_is_mended_in_a_copy() -> None:
    ((_, mend),) = build_filters(["fix_encoding"])
    row = {"messages": [{"role": "user", "content": "grÃ¼n", "train": True}, {"role": "assistant", "content": "ok"}]}
    assert mend(row) == {
        "messages": [{"role": "user", "content": "grün", "train": True}, {"role": "assistant", "content": "ok"}]
    }
    assert row["messages"][0]["content"] == "grÃ¼n"
