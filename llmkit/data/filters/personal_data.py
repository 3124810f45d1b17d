"""Masks personal data, or drops the rows that have some; what it was is never told, only of which kind and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from llmkit.data.filters import map_texts
from llmkit.data.personal import Span
from llmkit.data.personal.contacts import PhoneNumbers, find_emails, find_ips
from llmkit.data.personal.numbers import PersonalNumbers, find_cards
from llmkit.data.personal.secrets import find_secrets
from llmkit.data.specs import needed

Kind = Literal["secret", "e-mail", "iban", "national", "card", "ip", "phone"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # what two kinds claim is of the first
_MASKS = {
    "secret": "<SECRET>",
    "e-mail": "<EMAIL>",
    "iban": "<IBAN>",
    "national": "<NATIONAL_ID>",
    "card": "<CARD>",
    "ip": "<IP>",
    "phone": "<PHONE>",
}


class PersonalDataFilter:
    """Puts `<EMAIL>`, `<PHONE>`, ... in place of personal data of some kinds (None: all), or drops the row.

    `regions` are the countries (ISO 3166) whose phone numbers are found without the country's code. All texts of a row
    are looked through, those of tools and their calls too. Raises ValueError for regions that there are not, RecipeError
    when phonenumbers or python-stdnum is missing.
    """

    secret = True

    def __init__(
        self,
        kinds: list[Kind] | None = None,
        action: Literal["mask", "drop"] = "mask",
        regions: list[str] | None = None,
    ) -> None:
        wanted = KINDS if kinds is None else kinds
        if not wanted:
            raise ValueError("kinds names none")
        self.action = action
        self.counts: Counter[str] = Counter()
        finders: dict[str, Callable[[str], Iterable[Span]]] = {
            "secret": find_secrets,
            "e-mail": find_emails,
            "card": find_cards,
            "ip": find_ips,
        }
        if "phone" in wanted:
            try:
                finders["phone"] = PhoneNumbers(["US"] if regions is None else regions).find
            except ImportError:
                raise needed("filter", "personal_data", "phonenumbers") from None
        if "iban" in wanted or "national" in wanted:
            try:
                numbers = PersonalNumbers()
            except ImportError:
                raise needed("filter", "personal_data", "python-stdnum") from None
            finders |= {"iban": numbers.find_ibans, "national": numbers.find}
        self._finders = [(kind, finders[kind]) for kind in KINDS if kind in wanted]

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row, masked if so wanted, or a reason that says which kinds it has."""
        found: Counter[str] = Counter()

        def mask(text: str) -> str:
            spans = self._spans(text)
            found.update(kind for _, _, kind in spans)
            return _masked(text, spans) if spans else text

        masked = map_texts(row, mask, deep=True)
        if not found:
            return row
        self.counts += found
        if self.action == "mask":
            return masked
        return "personal data: " + ", ".join(kind for kind in KINDS if kind in found)

    def _spans(self, text: str) -> list[tuple[int, int, str]]:
        spans: list[tuple[int, int, str]] = []
        taken = bytearray()  # a 1 for each character that is spoken for
        for kind, find in self._finders:
            for start, end in find(text):
                taken = taken or bytearray(len(text))
                if not any(taken[start:end]):
                    taken[start:end] = b"\1" * (end - start)
                    spans.append((start, end, kind))
        return sorted(spans)


def _masked(text: str, spans: list[tuple[int, int, str]]) -> str:
    parts = []
    reached = 0
    for start, end, kind in spans:
        parts += [text[reached:start], _MASKS[kind]]
        reached = end
    return "".join([*parts, text[reached:]])
