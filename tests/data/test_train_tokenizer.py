"""A tokenizer trained here gives back any text, keeps to its size, and is the same after saving."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmkit.data.tokenizer import END, PAD, train_tokenizer

KINDS = ("bpe", "unigram", "wordpiece")
TEXTS = {
    "plain": "The quick brown fox jumps over the lazy dog.",
    "unseen script": "Быстрая лиса, 敏捷的棕色狐狸, ثعلب",
    "emoji": "🎉👩‍👩‍👧‍👦🇩🇪",
    "NUL": "a\0b\0",
    "CRLF": "one\r\ntwo\r\n",
    "white space": "  \t leading, trailing, doubled  inside \n\n ",
    "only spaces": "    ",
    "line breaks": "\n\n\n",
    "not normalised": "e\u0301 ß ẞ ﬁ Å",
    "separators": "a\u2028b\u00a0c\u200bd\ufeffe",
    "control": "".join(map(chr, range(32))) + "\x7f\x85",
    "long word": "0123456789abcdef" * 400,
    "long foreign word": "狐狸" * 800,
    "many spaces": " " * 3000 + "x",
    "marks": f"a {END} b",
    "punctuation": "don't stop-me_now (ever); isn't it?",
    "empty": "",
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return train_tokenizer(list(topics.values())[:30], request.param, 500)


@pytest.mark.parametrize("name", TEXTS)
def test_decoding_gives_back_what_was_encoded(tokenizer: Any, name: str) -> None:
    text = TEXTS[name]
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token is None or tokenizer.unk_token_id not in ids


def test_size_and_special_tokens(tokenizer: Any) -> None:
    assert 260 < len(tokenizer) <= 500
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.eos_token == END
    assert tokenizer.pad_token == PAD
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer(END)["input_ids"] == [tokenizer.eos_token_id]


def test_it_learnt_words(tokenizer: Any) -> None:
    text = "The value of the object is the name of the class"
    assert len(tokenizer(text)["input_ids"]) < len(text) / 1.7


def test_saved_and_loaded_it_gives_the_same_ids(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for text in TEXTS.values():
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text


def test_offsets_cover_the_text(tokenizer: Any) -> None:
    for text in TEXTS.values():
        covered = [False] * len(text)
        for start, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]:
            covered[start:end] = [True] * (end - start)
        assert all(covered)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_twice_gives_the_same_tokenizer(kind: str) -> None:
    texts = [f"word{i % 17} other{i % 5} thing" for i in range(200)]
    first, second = train_tokenizer(texts, kind, 350), train_tokenizer(texts, kind, 350)
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
