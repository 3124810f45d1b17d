"""E-mail addresses, phone numbers and IP addresses in text."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from typing import Any

from llmkit.data.personal import Span, holds

_LETTER = "A-Za-z0-9\u00c0-\u024f"
_LOCAL_CHARS = 64  # at most before the @ (RFC 5321)
_LOCAL = re.compile(rf"[{_LETTER}_](?:[{_LETTER}_.+%'-]*[{_LETTER}_+-])?$")
_DOMAIN = re.compile(
    rf"@(?:[{_LETTER}](?:[{_LETTER}-]{{0,61}}[{_LETTER}])?\.){{1,8}}(?:xn--[a-z0-9-]{{2,59}}|[A-Za-z\u00c0-\u024f]{{2,24}})(?![{_LETTER}_@(\[-])"
)
_IMAGE = re.compile(r"@[1-9]x\.")  # icon@2x.png

# Patterns begin with one set of characters, and look behind it only then: so they are searched for ten times as fast.
_IP4 = re.compile(r"[0-9](?<![\w.-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w-]|\.\w)", re.ASCII)
_HEX = re.compile("[0-9A-Fa-f]")
_COLONS = re.compile(r":[0-9A-Fa-f]{0,4}:")
_IP6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?:\.[0-9]{1,3}){0,3}(?![\w:]|\.\w)", re.ASCII)
_NO_ADDRESS = re.compile(
    r"(?:\b(?:v|ver|versions?|release|rev|section|sect|chapter|clause|figure|table)\b\.? ?|§ ?|[=<>~^] ?|[a-z]/|@)$",
    re.I,
)
_SMALL = 20  # four numbers below it, without a word about addresses, are taken for a version
_ADDRESS = re.compile(
    r"(?:\bip\b|\bipv4\b|address|host|server|dns|gateway|subnet|ping|from|client|peer)\W{0,5}(?:is|was|at|to)?\W{0,3}$|//$",
    re.I,
)

_PHONE = re.compile(
    r"[+(0-9](?<![\w.+/=%#&:-].)(?:(?<=\+) ?\(?[0-9]|(?<=\()[0-9]|(?<=[0-9]))"
    r"(?:[ ().\-/\u00a0\u2010-\u2013]{0,3}[0-9]){6,14}(?![\w]|[-.,:/][0-9])",
    re.ASCII,
)
_DIGITS = re.compile(r"[0-9]")
_DECIMAL = re.compile(r"(?!\+[0-9]{1,3}\.[0-9]{6})[+]?[0-9]+[.][0-9]+")
_DATE = re.compile(
    r"[0-9]{4}[-./][0-9]{1,2}[-./][0-9]{1,2}|[0-9]{1,2}[-./][0-9]{1,2}[-./][0-9]{4}|[0-9]{4} ?[-–] ?[0-9]{4}\b"
)
_ZERO_ALONE = re.compile(r"0[^0-9]")
_CALL = re.compile(
    r"(?:\b(?:tel|telephone|phone|mobile|cell|fax|call|sms|whatsapp|telefon|handy|tél|teléfono|telefono)\b[^\n\w]{0,4}|"
    r"电话[:：]?)$",
    re.I,
)
_NO_PHONE = re.compile(
    r"\b(?:order|invoice|ticket|case|ref|reference|serial|part|model|isbn|issn|id|item|sku|account|rfc)\b[^\n\w]{0,3}"
    r"(?:no|nr|number|id)?[^\n\w]{0,3}$",
    re.I,
)
_BEFORE = 24  # characters that are looked at for words about what comes


def find_emails(text: str) -> Iterator[Span]:
    """Addresses such as `jane.doe@example.com`, also with letters beyond ASCII; not `git@host`, `icon@2x.png`, `a@b.T`."""
    if "@" not in text:
        return
    for domain in _DOMAIN.finditer(text):
        at = domain.start()
        local = _LOCAL.search(text, max(0, at - _LOCAL_CHARS), at)
        if local and local[0] != "git" and not _IMAGE.match(domain[0]):
            yield local.start(), domain.end()


def find_ips(text: str) -> Iterator[Span]:
    """Addresses of IPv4 and IPv6 that are valid, but for those of no machine (loopback, 0.0.0.0, masks, multicast).

    Four small numbers are a version, unless a word before them says that they are an address.
    """
    for found in _IP4.finditer(text):
        before = text[max(0, found.start() - _BEFORE) : found.start()]
        small = max(map(int, found[0].split("."))) < _SMALL
        if (
            not _NO_ADDRESS.search(before)
            and (not small or _ADDRESS.search(before))
            and holds(_names_machine, found[0])
        ):
            yield found.span()
    reached = 0
    for colons in _COLONS.finditer(text):
        if colons.start() < reached:
            continue
        start = colons.start()
        while start > colons.start() - 4 and _HEX.match(text, start - 1):
            start -= 1
        if address := _IP6.match(text, start):
            reached = address.end()
            groups = [group for group in re.split("[:.]", address[0]) if group]
            if len(groups) > 2 and _DIGITS.search(address[0]) and holds(_names_machine, address[0]):
                yield address.span()


def _names_machine(address: str) -> bool:
    ip = ipaddress.ip_address(address)
    if ip.version == 4 and address.startswith(("0.", "255.")):
        return False
    return not (ip.is_loopback or ip.is_unspecified or ip.is_multicast or (ip.is_reserved and ip.version == 4))


class PhoneNumbers:
    """Numbers that Google's libphonenumber finds valid: with `+` and a country's code, or as written within `regions`.

    Within a region a number needs the separators that are usual there, or a word such as `phone` before it; after
    `order` or `invoice` it is none. Raises ValueError for regions that there are not, ImportError without phonenumbers.
    """

    def __init__(self, regions: Sequence[str]) -> None:
        import phonenumbers

        self._library: Any = phonenumbers
        self._regions: list[tuple[str, frozenset[int], str]] = []
        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise ValueError(
                    f"no region `{region}`: regions are ISO 3166 codes of two capital letters, such as US or DE"
                )
            plan: Any = phonenumbers.PhoneMetadata.metadata_for_region(region)
            trunk = plan.national_prefix or ""  # which is dialled first within a country: 0 in most, and then written
            lengths = {length + extra for length in plan.general_desc.possible_length for extra in (0, len(trunk))}
            self._regions.append((region, frozenset(lengths), trunk if trunk == "0" else ""))

    def find(self, text: str) -> Iterator[Span]:
        """Where the numbers stand."""
        for found in _PHONE.finditer(text):
            if holds(self._is_number, found, text):
                yield found.span()

    def _is_number(self, found: re.Match[str], text: str) -> bool:
        number = found[0]
        if _DECIMAL.fullmatch(number) or number.count("(") != number.count(")"):
            return False
        if number.startswith("+"):
            return self._valid(number, None)
        digits = "".join(_DIGITS.findall(number))
        if digits.startswith("00") and self._valid("+" + digits[2:], None):
            return True
        likely = [
            region
            for region, lengths, trunk in self._regions
            if len(digits) in lengths and number.lstrip("(").startswith(trunk)
        ]
        if not likely or _DATE.match(number) or _ZERO_ALONE.match(number):
            return False
        before = text[max(0, found.start() - _BEFORE) : found.start()]
        if _NO_PHONE.search(before):
            return False
        called = _CALL.search(before) is not None
        return any(self._valid(number, region) and (called or self._usual(number, region)) for region in likely)

    def _valid(self, number: str, region: str | None) -> bool:
        return bool(self._library.is_valid_number(self._library.parse(number, region)))

    def _usual(self, number: str, region: str) -> bool:
        """True when a number has separators, where they usually are."""
        if number.isdigit():
            return False
        levels = self._library.Leniency
        american = self._library.country_code_for_region(region) == 1  # where all numbers are grouped alike
        level = levels.EXACT_GROUPING if american else levels.STRICT_GROUPING
        return bool(self._library.PhoneNumberMatcher(number, region, leniency=level).has_next())
