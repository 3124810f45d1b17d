"""Text as words and lines, as the filters of quality count them."""

from __future__ import annotations

import re

_RANGES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED = re.compile(f"[{_RANGES}]")  # characters of scripts that are written without spaces
_WORD = re.compile(rf"[{_RANGES}]|[^\s{_RANGES}]+")


def split_words(text: str) -> list[str]:
    """What stands between white space; each character of scripts without it (Chinese, Japanese, Thai, ...) is a word."""
    if not text.isascii() and UNSPACED.search(text):
        return _WORD.findall(text)
    return text.split()


def split_lines(text: str) -> list[str]:
    """The lines that are not blank, without white space around them."""
    return [line for line in map(str.strip, text.split("\n")) if line]
