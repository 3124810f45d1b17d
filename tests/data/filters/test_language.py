"""language: what is kept of sentences in many languages, and how options are checked."""

from __future__ import annotations

from typing import Any

import pytest

from llmkit.data.filters import build_filters
from llmkit.errors import RecipeError

SENTENCES = {
    "ar": "جلست القطة على السجادة ونظرت إلى الطيور في الخارج.",
    "cs": "Kočka seděla na rohožce a dívala se na ptáky venku.",
    "de": "Die Katze saß auf der Matte und schaute den Vögeln zu.",
    "en": "The cat sat on the mat and looked at the birds outside.",
    "es": "El gato estaba sentado en la alfombra mirando los pájaros.",
    "fi": "Kissa istui matolla ja katseli lintuja ulkona.",
    "fr": "Le chat était assis sur le tapis et regardait les oiseaux.",
    "hi": "बिल्ली चटाई पर बैठकर बाहर पक्षियों को देख रही थी।",
    "ja": "猫はマットの上に座って外の鳥を見ていた。",
    "ko": "고양이는 매트 위에 앉아 바깥의 새들을 바라보았다.",
    "pl": "Kot siedział na macie i patrzył na ptaki na zewnątrz.",
    "pt": "O gato estava sentado no tapete olhando para os pássaros.",
    "tr": "Kedi paspasın üzerinde oturdu ve dışarıdaki kuşlara baktı.",
    "uk": "Кішка сиділа на килимку і дивилася на птахів.",
    "zh": "猫坐在垫子上看着外面的鸟。",
}


def build(**options: Any) -> Any:
    ((_, take_out),) = build_filters([{"language": options}])
    return take_out


def test_each_language_is_told() -> None:
    take_out = build(keep=["en", "ja"])
    for language, sentence in SENTENCES.items():
        row = {"text": sentence}
        assert take_out(row) == (row if language in ("en", "ja") else f"language {language}")


@pytest.mark.parametrize("text", ["12 34 56 78", "😀😀", "ok"])
def test_what_cannot_be_told_goes_unless_all_may_stay(text: str) -> None:
    assert build(keep=["de"])({"text": text}) == "language not certain"


def test_of_a_long_text_all_parts_count() -> None:
    take_out = build(keep=["en"])
    assert isinstance(take_out({"text": SENTENCES["en"] * 100}), dict)
    assert take_out({"text": "Title of the page\n" + SENTENCES["de"] * 100}) == "language de"


def test_a_conversation_is_judged_as_a_whole() -> None:
    row = {
        "messages": [{"role": "user", "content": SENTENCES["de"]}, {"role": "assistant", "content": SENTENCES["de"]}]
    }
    assert build(keep=["de"])(row) is row


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({"keep": ["english"]}, "the filter `language` does not know `english`", "did you mean `en`?"),
        ({"keep": ["zh-CN"]}, "the filter `language` does not know `zh-CN`", "did you mean `zh`?"),
        ({"keep": "en"}, "the option `keep` of the filter `language` has the wrong type", None),
        ({"keep": []}, "the filter `language` cannot be built", None),
        ({"keep": ["en"], "min_probability": 2}, "the filter `language` cannot be built", None),
        ({}, "the filter `language` needs the option `keep`", None),
    ],
)
def test_wrong_options_are_recipe_errors(options: dict[str, Any], what: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        build(**options)
    assert (caught.value.what, caught.value.problems[0].hint) == (what, hint)
    assert str(caught.value.problems[0].where).startswith("data.filters[0]")
