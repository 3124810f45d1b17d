"""Numbers of cards, bank accounts and persons in text, told by their form and check digits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import Any

from llmkit.data.personal import Span, holds

# Patterns begin with one set of characters, and look behind it only then: so they are searched for ten times as fast.
_CARD = re.compile(
    r"[0-9](?<![\w.+/=-].)(?:[0-9]{12,18}|[0-9]{3}([ -])(?:[0-9]{4}\1[0-9]{4}\1[0-9]{4}(?:\1[0-9]{3})?|[0-9]{6}\1[0-9]{4,5}))"
    r"(?![\w]|[-.][0-9]| [0-9]{4}(?![0-9/]))",
    re.ASCII,
)
_ISSUERS = (  # first digits, from and to, and how many digits there are
    (4, 4, (13, 16, 19)),  # Visa
    (51, 55, (16,)),  # Mastercard
    (2221, 2720, (16,)),
    (34, 34, (15,)),  # American Express
    (37, 37, (15,)),
    (6011, 6011, (16, 19)),  # Discover
    (644, 659, (16, 19)),
    (3528, 3589, (16,)),  # JCB
    (300, 305, (14, 16)),  # Diners
    (36, 36, (14,)),
    (38, 39, (14, 16)),
    (62, 62, (16, 17, 18, 19)),  # UnionPay
    (5018, 5018, (16,)),  # Maestro
    (5020, 5020, (16,)),
    (5038, 5038, (16,)),
    (6304, 6304, (16,)),
    (6759, 6763, (16,)),
)
_IBAN = re.compile(r"[A-Z](?<!\w.)[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", re.ASCII)
_AFTER = r"(?![\w]|[-.,/:][0-9])"
_TOKENS = (
    re.compile(  # digits, with marks or spaces between parts, or with a few letters
        r"[0-9](?<![\w.,/=+#&:-].)(?:[0-9A-Z]*(?:[.\-+/][0-9A-Z]+)+|[0-9]*(?: [0-9]{2,6}){1,6}|[0-9]{6,17}[A-Z]{0,2}|"
        rf"[0-9]{{5}}[A-F][0-9]{{3}}[0-9A-Z]){_AFTER}",
        re.ASCII,
    ),
    re.compile(rf"[A-Z](?<![\w.,/=+#&:-].)[A-Z]{{0,5}}[0-9][0-9A-Z]{{6,13}}[0-9A-Z]{_AFTER}", re.ASCII),
)
_SHAPE = str.maketrans("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", "d" * 10 + "A" * 26)
_BEFORE = 48  # characters that are looked at for a number's name


@dataclass(frozen=True)
class _Format:
    """The shapes (d: a digit, A: a capital letter) of one country's numbers, and words one of which must come before."""

    module: str
    shapes: tuple[str, ...]
    named: str = ""


_FORMATS = (
    _Format("us.ssn", ("ddd-dd-dddd",)),
    _Format("us.ssn", ("ddddddddd",), "ssn|social security"),
    _Format("us.itin", ("ddd-dd-dddd",)),
    _Format("ca.sin", ("ddd-ddd-ddd", "ddd ddd ddd", "ddddddddd"), "sin|social insurance|nas"),
    _Format("gb.nhs", ("ddd ddd dddd", "ddd-ddd-dddd", "dddddddddd"), "nhs"),
    _Format("ie.pps", ("dddddddA", "dddddddAA"), "pps|ppsn"),
    _Format("de.idnr", ("ddddddddddd", "dd ddd ddd ddd"), "steuer-?id|id-?nr|identifikationsnummer|tax id"),
    _Format("fr.nir", ("ddddddddddddddd", "d dd dd dd ddd ddd dd", "d dd dd dd ddd ddd")),
    _Format("es.dni", ("ddddddddA", "dddddddd-A", "dd.ddd.ddd-A")),
    _Format("es.nie", ("AdddddddA",)),
    _Format("pt.nif", ("ddddddddd", "ddd ddd ddd"), "nif|contribuinte"),
    _Format("it.codicefiscale", ("AAAAAAddAddAdddA",)),
    _Format("nl.bsn", ("ddddddddd", "dddd.dd.ddd"), "bsn|burgerservicenummer|sofi-?nummer"),
    _Format("be.nn", ("dd.dd.dd-ddd.dd", "ddddddddddd")),
    _Format("ch.ssn", ("ddd.dddd.dddd.dd", "ddddddddddddd")),
    _Format("pl.pesel", ("ddddddddddd",), "pesel"),
    _Format("cz.rc", ("dddddd/dddd",)),
    _Format("ro.cnp", ("ddddddddddddd",), "cnp|cod numeric personal"),
    _Format("bg.egn", ("dddddddddd",), "egn|егн"),
    _Format("hr.oib", ("ddddddddddd",), "oib"),
    _Format("gr.amka", ("ddddddddddd",), "amka|αμκα"),
    _Format("ee.ik", ("ddddddddddd",), "isikukood"),
    _Format("se.personnummer", ("dddddd-dddd", "dddddd+dddd", "dddddddd-dddd")),
    _Format("no.fodselsnummer", ("ddddddddddd", "dddddd ddddd"), "fødselsnummer|personnummer|fnr"),
    _Format("dk.cpr", ("dddddd-dddd",), "cpr|personnummer"),
    _Format("fi.hetu", ("dddddd-dddA", "dddddd-dddd", "dddddd+dddA", "ddddddAdddA", "ddddddAdddd")),
    _Format("tr.tckimlik", ("ddddddddddd",), "kimlik|tckn"),
    _Format("il.idnr", ("ddddddddd",), "teudat zehut|ת.ז"),
    _Format("ru.inn", ("dddddddddddd",), "inn|инн"),
    _Format("br.cpf", ("ddd.ddd.ddd-dd",)),
    _Format("br.cpf", ("ddddddddddd",), "cpf"),
    _Format("mx.curp", ("AAAAddddddAAAAAAdd", "AAAAddddddAAAAAAAd")),
    _Format("in_.aadhaar", ("dddd dddd dddd", "dddddddddddd"), "aadhaar|aadhar|uidai"),
    _Format("cn.ric", ("dddddddddddddddddd", "dddddddddddddddddA")),
    _Format("jp.in_", ("dddd dddd dddd", "dddddddddddd"), "my number|マイナンバー|個人番号"),
    _Format("kr.rrn", ("dddddd-ddddddd",)),
    _Format("au.tfn", ("ddd ddd ddd", "ddddddddd"), "tfn|tax file"),
    _Format("za.idnr", ("ddddddddddddd",), "id number|identity number|id no"),
)


def find_cards(text: str) -> Iterator[Span]:
    """Card numbers: Luhn's check digit, the first digits of an issuer, and all in one or in the groups of a card."""
    for found in _CARD.finditer(text):
        digits = re.sub("[ -]", "", found[0])
        if _issued(digits) and _luhn(digits):
            yield found.span()


def _issued(digits: str) -> bool:
    return any(len(digits) in sizes and low <= int(digits[: len(str(low))]) <= high for low, high, sizes in _ISSUERS)


def _luhn(digits: str) -> bool:
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[-1::-2])) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


class PersonalNumbers:
    """Bank accounts (IBAN) and the numbers that states give to persons, each checked as its country does (python-stdnum).

    Raises ImportError without python-stdnum.
    """

    def __init__(self) -> None:
        self._iban: Callable[[str], Any] = import_module("stdnum.iban").is_valid
        self._by_shape: dict[str, list[tuple[Callable[[str], Any], re.Pattern[str] | None]]] = {}
        for form in _FORMATS:
            check = import_module(f"stdnum.{form.module}").is_valid
            named = re.compile(rf"(?i)(?<![^\W_])(?:{form.named})(?![^\W_])") if form.named else None
            for shape in form.shapes:
                self._by_shape.setdefault(shape, []).append((check, named))

    def find_ibans(self, text: str) -> Iterator[Span]:
        """Where IBANs stand, in one or in groups of four."""
        for found in _IBAN.finditer(text):
            number = found[0]
            while len(number) > 14:
                if holds(self._iban, number):
                    yield found.start(), found.start() + len(number)
                    break
                number = number.rpartition(" ")[0]  # a word in capitals may have come after it

    def find(self, text: str) -> Iterator[Span]:
        """Where numbers of persons stand."""
        for found in chain.from_iterable(token.finditer(text) for token in _TOKENS):
            for start, end in _runs(found[0]):
                checks = self._by_shape.get(found[0][start:end].translate(_SHAPE))
                if checks and self._passes(found[0][start:end], checks, text, found.start() + start):
                    yield found.start() + start, found.start() + end
                    break

    def _passes(self, number: str, checks: list[Any], text: str, start: int) -> bool:
        before = text[max(0, start - _BEFORE) : start]
        return any((named is None or named.search(before)) and holds(check, number) for check, named in checks)


def _runs(token: str) -> Iterator[Span]:
    """The token itself, and where it has spaces all runs of its parts, longer ones first."""
    if " " not in token:
        yield 0, len(token)
        return
    starts = [0, *(at + 1 for at, character in enumerate(token) if character == " ")]
    ends = [*(at - 1 for at in starts[1:]), len(token)]
    for length in range(len(starts), 0, -1):
        for first in range(len(starts) - length + 1):
            yield starts[first], ends[first + length - 1]
