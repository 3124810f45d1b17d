"""Keeps keys, tokens and passwords out of what is shown and sent: a recipe may name a URL with a login."""

from __future__ import annotations

import re

from llmkit.data.personal.secrets import find_secrets

_LOGIN = re.compile(r"(?<=://)[^\s/@'\"<>]+:[^\s/@'\"<>]+(?=@)")
_IN_QUERY = re.compile(
    r"(?i)([?&](?:[\w.-]*(?:token|signature|secret|password|credential|api[_-]?key|access[_-]?key)[\w.-]*|sig|key)=)"
    r"[^&\s'\"<>#]+"
)
MASK = "<SECRET>"


def without_secrets(text: str) -> str:
    """The text with a mark in place of each secret: in URLs whatever it looks like, elsewhere by its form."""
    text = _IN_QUERY.sub(rf"\1{MASK}", _LOGIN.sub(MASK, text))
    for start, end in sorted(set(find_secrets(text)), reverse=True):
        text = text[:start] + MASK + text[end:]
    return text
