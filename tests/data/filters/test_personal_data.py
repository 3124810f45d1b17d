"""personal_data: what is masked and what only looks like it, and that no value is ever told.

All values are made up, published as examples by those who issue them, or reserved for that.
"""

from __future__ import annotations

import traceback
from typing import Any

import pytest

from llmkit.data import personal
from llmkit.data.filters import build_filters
from llmkit.data.filters.personal_data import KINDS
from llmkit.errors import RecipeError

GITHUB = "ghp_" + "0123456789abcdefghijABCDEFGHIJ012345"
SLACK = "xoxb-" + "123456789012-abcdefABCDEF"
STRIPE = "sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc"
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
KEY = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMIIEow+/\nabc=\n-----END RSA PRIVATE KEY-----"

PERSONAL = {
    "e-mail": [
        ("write to jane.doe+x@example.co.uk.", "write to <EMAIL>."),
        ("<müller@bücher.de>", "<<EMAIL>>"),
        ("邮箱a.b@example.com谢谢", "邮箱<EMAIL>谢谢"),
        ("mailto:j_d@mail.example.museum?subject=x", "mailto:<EMAIL>?subject=x"),
    ],
    "phone": [
        ("call (202) 555-0123 or 202-555-0123", "call <PHONE> or <PHONE>"),
        ("+49 30 901820", "<PHONE>"),
        ("0049 30 901820", "<PHONE>"),
        ("tel: 2025550123", "tel: <PHONE>"),
        ("ring +442079460958!", "ring <PHONE>!"),
    ],
    "ip": [
        ("from 8.8.8.8 port 22", "from <IP> port 22"),
        ("http://93.184.216.34/x", "http://<IP>/x"),
        ("my IP address is 1.2.3.4", "my IP address is <IP>"),
        ("2001:4860:4860::8888", "<IP>"),
        ("[2001:db8::8a2e:370:7334]:80", "[<IP>]:80"),
        ("192.168.1.17/24", "<IP>/24"),
    ],
    "card": [
        ("card 4111 1111 1111 1111 12/27", "card <CARD> 12/27"),
        ("5555-5555-5555-4444", "<CARD>"),
        ("378282246310005, 3714 496353 98431", "<CARD>, <CARD>"),
    ],
    "iban": [
        ("DE89 3704 0044 0532 0130 00 EUR", "<IBAN> EUR"),
        ("GB82WEST12345698765432", "<IBAN>"),
        ("IBAN: FR14 2004 1010 0505 0001 3M02 606.", "IBAN: <IBAN>."),
    ],
    "national": [
        ("ssn 536-90-4399", "ssn <NATIONAL_ID>"),
        ("NHS number: 943 476 5919", "NHS number: <NATIONAL_ID>"),
        ("Steuer-ID 36 574 261 809", "Steuer-ID <NATIONAL_ID>"),
        ("1 84 12 76 451 089 46", "<NATIONAL_ID>"),
        ("DNI 54362315K, NIE X2482300W", "DNI <NATIONAL_ID>, NIE <NATIONAL_ID>"),
        ("RCCMNL83S18D969H", "<NATIONAL_ID>"),
        ("CPF 390.533.447-05", "CPF <NATIONAL_ID>"),
        ("BOXW310820HNERXN09", "<NATIONAL_ID>"),
        ("personnummer 850101-0006", "personnummer <NATIONAL_ID>"),
        ("131052-308T", "<NATIONAL_ID>"),
    ],
    "secret": [
        ("AKIAIOSFODNN7EXAMPLE", "<SECRET>"),
        (GITHUB, "<SECRET>"),
        (SLACK, "<SECRET>"),
        (STRIPE, "<SECRET>"),
        (f"token={TOKEN}", "token=<SECRET>"),
        (KEY, "<SECRET>"),
        ('api_key = "a8Fk29sLq01ZxMn47TyB"', 'api_key = "<SECRET>"'),
        ("SECRET_KEY=a8Fk29sLq01ZxMn47TyB\nDEBUG=1", "SECRET_KEY=<SECRET>\nDEBUG=1"),
        ("postgres://app:hunter22@db/x", "postgres://app:<SECRET>@db/x"),
        ("Authorization: Bearer 9f8a7b6c5d4e3f2a1b0c9d8e", "Authorization: Bearer <SECRET>"),
        ("password: 'Tr0ub4dor3'", "password: '<SECRET>'"),
    ],
}
CLEAN = [
    "git@github.com:a/b.git, icon@2x.png, @property, a @ b, x@y, lodash@4.17.21, self.w@x.T",
    "version 1.2.3.4, v1.2.3.4, foo==1.2.3.4, Chrome/120.0.0.0, see 1.2.3.4 for, section 10.20.30.40",
    "127.0.0.1 and 0.0.0.0 and ::1, mask 255.255.255.0, OID 1.3.6.1.4.1, 999.1.1.1, 192.168.1.300",
    "at 12:34:56, std::vector<int>, x[1::2], aa:bb:cc:dd:ee:ff, dead::beef, fe::add()",
    "2024-01-15 10:20:30, 15/01/2024, 1990-2000, 1700000000000, $1,234,567,890, 10 20 30 40 50 60",
    "order 555-123-4567, Order no. 202-555-0123, ISBN 978-3-16-148410-0, item 202 555 0199",
    "4111 1111 1111 1112 and 1234567890123456 and 0.4111111111111111 and 2650 1514 1514 1514 1514",
    "https://example.org/4111111111111111/2025550123?id=536904399#8.8",
    "DE00 3704 0044 0532 0130 00, GB82WEST12345698765433, XX12345678901234567890",
    "000-12-3456, 666-12-3456, 123456789, 12345678A, ABCDEF12G34H567I",
    "3.14159265358979, pi=3.1415926535, 0.333333333, 1e10, 6.02214076e23",
    "sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "commit 3f2a1b0c9d8e7f6a5b4c3f2a1b0c9d8e7f6a5b4c, UUID 123e4567-e89b-12d3-a456-426614174000",
    "api_key = os.environ['API_KEY']; token = \"your-token-here-123456\"; password = 'password'",
    "task-1234567890, sk-learn, eyJhbGci.x.y, ghp_short, http://user:password@host/",
    "def next_token(self, tokens: list[str]) -> str: return tokens[self.secret_index]",
    "猫が好き 12345、مرحبا 123، 😀 100% हिन्दी",
]


def build(**options: Any) -> Any:
    ((_, take_out),) = build_filters([{"personal_data": options}])
    return take_out


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_masked_and_counted(kind: str) -> None:
    for text, masked in PERSONAL[kind]:
        mask = build(kinds=[kind])
        once = mask({"text": text})
        assert once == {"text": masked}
        assert mask.counts == {kind: masked.count("<") - text.count("<")}
        assert mask(once) is once


@pytest.mark.parametrize(("text", "masked"), [case for cases in PERSONAL.values() for case in cases])
def test_all_kinds_together_find_the_same(text: str, masked: str) -> None:
    mask = build()
    assert mask({"text": text}) == {"text": masked}
    assert mask(mask({"text": text})) == {"text": masked}


@pytest.mark.parametrize("text", CLEAN)
def test_what_only_looks_like_it_stays(text: str) -> None:
    mask = build()
    row = {"text": text}
    assert mask(row) is row
    assert not mask.counts


def test_regions_say_how_national_phone_numbers_look() -> None:
    assert build(regions=["DE", "GB"])({"text": "030 901820, 020 7946 0958"}) == {"text": "<PHONE>, <PHONE>"}
    assert build(regions=["DE"])({"text": "202-555-0123 0.333333333"}) == {"text": "202-555-0123 0.333333333"}
    assert build(regions=[])({"text": "202-555-0123 +1 202-555-0123"}) == {"text": "202-555-0123 <PHONE>"}


def test_rows_are_dropped_with_the_kinds_as_reason() -> None:
    drop = build(action="drop")
    text = "jane@example.com 93.184.216.34 jim@example.com"
    assert drop({"text": text}) == "personal data: e-mail, ip"
    assert drop.counts == {"e-mail": 2, "ip": 1}
    row = {"text": CLEAN[0]}
    assert drop(row) is row


def test_all_texts_of_a_conversation_are_masked_in_a_copy() -> None:
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": ["jane@example.com"], "n": 1}}}
    row = {
        "messages": [
            {"role": "user", "content": "I am jane@example.com"},
            {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "jane@example.com it is"},
            {"role": "tool", "content": '{"ip": "8.8.8.8"}'},
        ],
        "tools": [{"description": "asks admin@example.com"}],
    }
    before = repr(row)
    masked = build()(row)
    assert repr(row) == before
    assert "example.com" not in repr(masked)
    assert "8.8.8.8" not in repr(masked)
    assert masked["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"to": ["<EMAIL>"], "n": 1}
    assert [message["role"] for message in masked["messages"]] == ["user", "assistant", "tool"]


def test_the_label_of_a_row_stays() -> None:
    assert build()({"text": "jane@example.com", "label": "+1 202-555-0123"}) == {
        "text": "<EMAIL>",
        "label": "+1 202-555-0123",
    }


def test_no_value_is_told_by_reasons_counts_or_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    drop = build(action="drop")
    for cases in PERSONAL.values():
        for text, _ in cases:
            reason = drop({"text": text})
            assert set(reason.removeprefix("personal data: ").split(", ")) <= set(KINDS)
    assert drop.secret
    assert drop.counts.keys() == set(KINDS)
    assert "example.com" not in repr(vars(drop))


def test_an_error_of_a_library_is_not_shown() -> None:
    def fails(value: str) -> bool:
        raise ValueError(f"cannot read {value}")

    try:
        assert personal.holds(fails, "jane") is False
    except ValueError:
        pytest.fail(traceback.format_exc())


def test_where_two_kinds_claim_the_same_the_first_has_it() -> None:
    assert build()({"text": "https://jane:s3cret99@example.com"}) == {"text": "https://jane:<SECRET>@example.com"}
    assert build(kinds=["phone", "national"])({"text": "NHS 943 476 5919"}) == {"text": "NHS <NATIONAL_ID>"}


@pytest.mark.parametrize(
    "text", ["1." * 50000, "12 345 " * 20000, "a@" * 50000, ":" * 50000, "sk-aaaaaaaa-" * 20000, "AB12 CDEF " * 10000]
)
def test_endless_look_alikes_end(text: str) -> None:
    row = {"text": text}
    assert build()(row) is row


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        (
            {"kinds": ["email"]},
            "the option `kinds` of the filter `personal_data` has the wrong value",
            "did you mean `e-mail`?",
        ),
        ({"kinds": []}, "the filter `personal_data` cannot be built", None),
        ({"regions": ["USA"]}, "the filter `personal_data` cannot be built", None),
        ({"action": "hide"}, "the option `action` of the filter `personal_data` has the wrong value", None),
    ],
)
def test_wrong_options_are_recipe_errors(options: dict[str, Any], what: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        build(**options)
    assert (caught.value.what, caught.value.hint) == (what, hint)
