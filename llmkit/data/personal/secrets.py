"""Keys, tokens and passwords in text. Forms as their issuers publish them, most also in gitleaks' and detect-secrets' rules."""

from __future__ import annotations

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Iterator

from llmkit.data.personal import Span, holds

_FORMS = {  # what must stand in the text -> the whole
    "AKIA": r"\bAKIA[A-Z2-7]{16}\b",  # AWS
    "ASIA": r"\bASIA[A-Z2-7]{16}\b",
    "AIza": r"\bAIza[\w-]{35}(?![\w-])",  # Google
    "GOCSPX-": r"\bGOCSPX-[\w-]{28}(?![\w-])",
    "ya29.": r"\bya29\.[\w-]{30,}",
    "ghp_": r"\bghp_[A-Za-z0-9]{36,255}\b",  # GitHub
    "gho_": r"\bgho_[A-Za-z0-9]{36,255}\b",
    "ghu_": r"\bghu_[A-Za-z0-9]{36,255}\b",
    "ghs_": r"\bghs_[A-Za-z0-9]{36,255}\b",
    "ghr_": r"\bghr_[A-Za-z0-9]{36,255}\b",
    "github_pat_": r"\bgithub_pat_\w{60,255}",
    "glpat-": r"\bglpat-[\w-]{20,}",  # GitLab
    "xox": r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",  # Slack
    "xapp-": r"\bxapp-[0-9]-[A-Za-z0-9-]{20,}",
    "hooks.slack.com": r"https://hooks\.slack\.com/(?:services|workflows)/[\w/]{20,}",
    "k_live_": r"\b[rs]k_live_[A-Za-z0-9]{20,}",  # Stripe
    "sk-": r"\bsk-(?:ant-|proj-|svcacct-)?(?=[\w-]{0,200}[0-9])(?=[\w-]{0,200}[A-Z])[\w-]{32,}",  # OpenAI, Anthropic
    "hf_": r"\bhf_[A-Za-z]{30,}\b",  # Hugging Face
    "npm_": r"\bnpm_[A-Za-z0-9]{36}\b",
    "pypi-": r"\bpypi-AgE[\w-]{50,}",
    "SG.": r"\bSG\.[\w-]{20,24}\.[\w-]{39,50}",  # SendGrid
    "PRIVATE KEY": r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----(?:[\w+/=\s:,.\\]++|-(?!----))*+"
    r"(?:-----END [A-Z ]{0,30}PRIVATE KEY(?: BLOCK)?-----)?",
}
_ISSUED = [(mark, re.compile(form, re.ASCII)) for mark, form in _FORMS.items()]
_JWT = re.compile(r"\beyJ[\w-]{8,2000}\.eyJ[\w-]{8,20000}\.[\w-]{8,}", re.ASCII)
_LOGIN = re.compile(r"://[^\s/:@'\"<>]{1,64}:([^\s/:@'\"<>]{6,128})@")  # scheme://user:password@host
_VALUE = re.compile(
    r"[=:][ \t]*(?:[\"']([^\s\"'<>{}$]{8,256})[\"']|([\w+/.~-]{16,256}=*)(?=[ \t]*$))", re.ASCII | re.MULTILINE
)
_NAME = re.compile(
    r"(?i)(?:(?P<password>passw(?:or)?d|passphrase|pwd)|api[_-]?key|secret|token|access[_-]?key|private[_-]?key|auth[_-]?key|"
    r"credentials?|client[_-]?key)[\w-]{0,20}[\"'\])]{0,3}[ \t]*$"
)
_BEARER = re.compile(r"\b[Bb]earer[ \t]+([\w.~+/-]{20,512}=*)", re.ASCII)
_NO_SECRET = re.compile(
    r"(?i)example|your|xxx|\*\*\*|\.\.\.|placeholder|change|dummy|sample|redacted|here|insert|https?:|test"
)
_BITS = 3.2  # of entropy a character, of what is drawn at random: words have less
_BEFORE = 48


def find_secrets(text: str) -> Iterator[Span]:
    """Keys and tokens of known form, private keys, passwords in URLs, and random values of what is called a key."""
    for mark, form in _ISSUED:
        if mark in text:
            yield from (found.span() for found in form.finditer(text))
    if "eyJ" in text:
        yield from (found.span() for found in _JWT.finditer(text) if holds(_is_header, found[0].partition(".")[0]))
    if "://" in text:
        yield from (found.span(1) for found in _LOGIN.finditer(text) if _is_password(found[1]))
    if "earer" in text:
        yield from (found.span(1) for found in _BEARER.finditer(text) if _is_random(found[1]))
    for found in _VALUE.finditer(text):
        group = 1 if found[1] else 2
        name = _NAME.search(text, max(0, found.start() - _BEFORE), found.start())
        password = name is not None and name["password"] and group == 1 and _is_password(found[group])
        if name and (password or _is_random(found[group])):
            yield found.span(group)


def _is_header(part: str) -> bool:
    """True for the first part of a JSON web token (RFC 7519)."""
    return "alg" in json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))


def _is_random(value: str) -> bool:
    if len(value) < 16 or value.isalpha() or value.isdigit() or not any(map(str.isdigit, value)):
        return False
    counts = Counter(value).values()
    bits = -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
    return bits >= _BITS and not _NO_SECRET.search(value)


def _is_password(value: str) -> bool:
    mixed = any(map(str.isdigit, value)) and any(map(str.isalpha, value))
    return mixed and not _NO_SECRET.search(value)
