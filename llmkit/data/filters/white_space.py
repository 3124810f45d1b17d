"""Makes white space plain: one kind of blank, one kind of line break, and none that cannot be seen."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from llmkit.data.filters import clean_texts

_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_BLANKS = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_UNSEEN = "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u180e\u200b\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb"
_GONE = re.compile(f"[{_UNSEEN}]+")
_LONE_JOINER = re.compile("(?<![^\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f])")
_SPECIAL = re.compile(f"[{_UNSEEN}\x0b-\x0d\x85\xa0\u1680\u2000-\u200d\u2028\u2029\u202f\u205f\u3000]")
_TRAILING = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)
_RUN = re.compile(r"(?<=[^ \t\n])[ \t]{2,}")
_RUN_OF_SPACES = re.compile(r"  (?<=[^ \n]  ) *")  # begins with plain characters, which are found ten times as fast
_INDENTATION = re.compile(r"^[ \t]+", re.MULTILINE)
_MANY_BREAKS = re.compile(r"\n{3,}")


class WhiteSpaceFilter:
    """Leaves single blanks within lines, none at their ends, and at most one empty line between others.

    Line breaks of all kinds become `\\n` and blanks of all kinds spaces; control and zero-width characters go, but for the
    joiners between letters (Persian, Hindi) and emoji. A run of blanks becomes one, a tab where the run has one. With
    `keep_indentation`, as code needs it, blanks before a line's first character stay as they are.
    """

    def __init__(self, keep_indentation: bool = True) -> None:
        self.keep_indentation = keep_indentation
        self.counts: Counter[str] = Counter()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, with plain white space, or the reason when nothing was left of a text."""
        return clean_texts(row, self._clean)

    def _clean(self, text: str) -> str:
        plain = text
        if _SPECIAL.search(text):
            plain = _GONE.sub("", _BLANKS.sub(" ", _BREAKS.sub("\n", plain)))
            plain = _LONE_JOINER.sub("", plain)
        if " \n" in plain or "\t\n" in plain:
            plain = _TRAILING.sub("", plain)
        if not self.keep_indentation:
            plain = _INDENTATION.sub("", plain)
        plain = _RUN.sub(_one, plain) if "\t" in plain else _RUN_OF_SPACES.sub(" ", plain)
        if "\n\n\n" in plain:
            plain = _MANY_BREAKS.sub("\n\n", plain)
        plain = _ends_plain(plain)
        if plain != text:
            self.counts["texts"] += 1
        return plain


def _one(run: re.Match[str]) -> str:
    return "\t" if "\t" in run[0] else " "


def _ends_plain(text: str) -> str:
    """Without empty lines at the ends; a last line break stays."""
    text = text.lstrip("\n")
    body = text.rstrip(" \t\n")
    return body + "\n" if body and "\n" in text[len(body) :] else body
