"""Augmentations: seeded, at their rates, and never of what is learnt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from llmkit.catalog import names
from llmkit.data.augment import augmentation_files, build_augmentations
from llmkit.errors import DataError, RecipeError

ON_TEXT = [name for name in names("augmentation") if name != "token_masking"]
WORDS = " ".join(f"word{'abcdefghij'[n % 10]}{'klmnopqrst'[n // 10 % 10]}" for n in range(4000))
CHAT = {
    "messages": [
        {"role": "system", "content": WORDS[:900]},
        {"role": "user", "content": WORDS[:900]},
        {"role": "assistant", "content": WORDS[:900]},
        {"role": "tool", "content": WORDS[:900]},
        {"role": "user", "content": WORDS[900:1800], "name": "ann"},
        {"role": "assistant", "content": WORDS[:900]},
    ]
}


def one(spec: Any) -> Any:
    ((_, augment),) = build_augmentations([spec])
    return augment


def changed(spec: Any, text: str = WORDS, seed: int = 1) -> str:
    return one(spec)({"text": text}, np.random.default_rng(seed))["text"]


@pytest.mark.parametrize("name", ON_TEXT)
def test_the_same_generator_gives_the_same_row(name: str) -> None:
    assert changed(name) == changed(name)
    assert changed(name) != changed(name, seed=2)
    assert changed(name) != WORDS


@pytest.mark.parametrize("name", ON_TEXT)
def test_of_a_conversation_only_user_turns_change(name: str) -> None:
    before = repr(CHAT)
    row = one({name: {"rate": 0.5}})(CHAT, np.random.default_rng(1))
    assert repr(CHAT) == before
    for old, new in zip(CHAT["messages"], row["messages"], strict=True):
        assert (old["content"] != new["content"]) == (old["role"] == "user")
        assert {**old, "content": ""} == {**new, "content": ""}


@pytest.mark.parametrize("name", ON_TEXT)
def test_labels_stay_and_no_text_becomes_blank(name: str) -> None:
    augment = one({name: {"rate": 1.0}})
    for text in ("a", "I", "猫", "  x\n", "1", "😀"):
        row = augment({"text": text, "label": "I"}, np.random.default_rng(1))
        assert row["label"] == "I"
        assert row["text"].strip()


@pytest.mark.parametrize("name", ON_TEXT)
def test_the_share_is_of_the_rows(name: str) -> None:
    augment, random = one({name: {"share": 0.3}}), np.random.default_rng(1)
    row = {"text": WORDS[:2000]}
    assert 0.25 < np.mean([augment(row, random) != row for _ in range(1000)]) < 0.35


def test_words_are_left_out_at_the_rate() -> None:
    left = changed({"word_deletion": {"rate": 0.2}}).split()
    assert 0.77 < len(left) / len(WORDS.split()) < 0.83
    kept = iter(WORDS.split())
    assert all(word in kept for word in left)  # in their order
    assert changed({"word_deletion": {"rate": 0.5}}, "a\n  b c\n\nd").count("\n") == 3


def test_words_change_places_at_the_rate() -> None:
    text = " ".join(str(number) for number in range(5000))
    moved = [int(word) for word in changed({"word_swap": {"rate": 0.2}}, text).split()]
    assert sorted(moved) == list(range(5000))
    assert 0.17 < np.mean(np.array(moved) != np.arange(5000)) < 0.23
    assert np.abs(np.array(moved) - np.arange(5000)).max() == 1
    assert changed({"word_swap": {"rate": 1.0}}, "a\n  b c") == "b\n  a c"


def test_words_change_case_at_the_rate() -> None:
    new = changed({"case": {"rate": 0.2}})
    assert new.lower() == WORDS
    assert 0.17 < np.mean([a != b for a, b in zip(WORDS.split(), new.split(), strict=True)]) < 0.23
    assert changed({"case": {"rate": 1.0}}, "猫 123 שלום") == "猫 123 שלום"


def test_letters_slip_at_the_rate() -> None:
    text = "thequickbrownfoxjumpsoverthelazydog" * 200
    new = changed({"typos": {"rate": 0.1}}, text)
    assert abs(len(new) - len(text)) < 0.02 * len(text)
    assert changed({"typos": {"rate": 1.0}}, "12 34\n!?") == "12 34\n!?"
    slips = {changed({"typos": {"rate": 1.0}}, "S", seed) for seed in range(400)}
    assert slips == {"SS", "S", *"AWEDZX"}  # doubled, dropped (and so put back), the keys around
    pairs = {changed({"typos": {"rate": 0.5}}, "猫犬", seed) for seed in range(60)}
    assert {"犬猫", "猫", "犬", "猫猫犬"} <= pairs


class TestTokenMasking:
    tokenizer = SimpleNamespace(mask_token_id=4, unk_token_id=3, all_special_ids=[0, 1, 3, 4])
    example: ClassVar = {"input_ids": np.tile(np.array([0, 10, 11, 12, 13, 1], np.uint16), 2000), "weight": 1.0}

    def test_open_tokens_are_masked_at_the_rate(self) -> None:
        example = {**self.example, "supervised": np.tile(np.array([0, 0, 0, 1, 1, 1], bool), 2000)}
        before = example["input_ids"].copy()
        mask = one({"token_masking": {"rate": 0.3}})
        assert mask.on_tokens
        new = mask(example, np.random.default_rng(1), self.tokenizer)
        assert (example["input_ids"] == before).all()
        assert new["input_ids"].dtype == np.uint16
        masked = (new["input_ids"] == 4).reshape(-1, 6)
        assert (new["input_ids"][~masked.reshape(-1)] == before[~masked.reshape(-1)]).all()
        assert masked[:, [0, 3, 4, 5]].sum() == 0
        assert (np.abs(masked[:, 1:3].mean(axis=0) - 0.3) < 0.04).all()
        again = mask(example, np.random.default_rng(1), self.tokenizer)
        assert (again["input_ids"] == new["input_ids"]).all()

    def test_without_supervision_all_but_special_tokens_are_open(self) -> None:
        new = one("token_masking")(self.example, np.random.default_rng(1), self.tokenizer)
        assert (new["input_ids"].reshape(-1, 6) == 4).any(axis=0).tolist() == [False, True, True, True, True, False]

    def test_the_unknown_token_stands_in_and_without_it_is_an_error(self) -> None:
        tokenizer = SimpleNamespace(mask_token_id=None, unk_token_id=3, all_special_ids=[0, 1, 3])
        assert 3 in one("token_masking")(self.example, np.random.default_rng(1), tokenizer)["input_ids"]
        tokenizer.unk_token_id = None
        with pytest.raises(RecipeError, match="no token to mask with"):
            one("token_masking")(self.example, np.random.default_rng(1), tokenizer)


OWN = """
def shout(row, random):
    return {**row, "text": row["text"].upper() + str(random.integers(10))}


def forgets(row, random):
    pass


class Masks:
    on_tokens = True

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, example, random, tokenizer):
        return {"input_ids": [self.token]}
"""


@pytest.mark.usefixtures("own")
class TestOwn:
    @pytest.fixture
    def own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "noise.py").write_text(OWN, encoding="utf-8")

    def test_it_gives_a_row(self) -> None:
        assert changed("noise.py:shout", "ab", seed=1) == changed("./noise.py:shout", "ab", seed=1)
        assert changed("noise.py:shout", "ab")[:2] == "AB"
        assert augmentation_files(["case", "./noise.py:shout"]) == [Path("noise.py")]

    def test_or_an_example(self) -> None:
        masks = one({"noise.py:Masks": {"token": 7}})
        assert masks.on_tokens
        assert masks({"input_ids": [1]}, np.random.default_rng(1), None) == {"input_ids": [7]}
        with pytest.raises(DataError, match="gave a wrong answer"):
            masks({"input_ids": [1], "supervised": [1]}, np.random.default_rng(1), None)

    def test_anything_else_is_an_error(self) -> None:
        with pytest.raises(DataError) as caught:
            changed("noise.py:forgets")
        assert (caught.value.what, caught.value.got) == (
            "the augmentation `noise.py:forgets` gave a wrong answer",
            "None",
        )

    def test_what_it_needs_is_told(self) -> None:
        with pytest.raises(RecipeError) as caught:
            one("noise.py:Masks")
        assert caught.value.what == "the augmentation `noise.py:Masks` needs the option `token`"
        assert caught.value.problems[0].expected == "token: a whole number"


@pytest.mark.parametrize(
    ("spec", "what", "hint"),
    [
        ("typo", "unknown augmentation `typo`", "did you mean `typos`?"),
        ({"typos": {"rates": 1}}, "the augmentation `typos` has no option `rates`", "did you mean `rate`?"),
        ({"typos": {"rate": 0}}, "the augmentation `typos` cannot be built", None),
        ({"token_masking": {"share": 1.5}}, "the augmentation `token_masking` cannot be built", None),
        ({"case": {"rate": "much"}}, "the option `rate` of the augmentation `case` has the wrong type", None),
        (3, "an augmentation is not described as augmentations are", None),
    ],
)
def test_a_wrong_augmentation_is_a_recipe_error(spec: Any, what: str, hint: str | None) -> None:
    with pytest.raises(RecipeError) as caught:
        build_augmentations(["case", spec])
    assert (caught.value.what, caught.value.hint) == (what, hint)
    assert str(caught.value.where).startswith("data.augment[1]")
