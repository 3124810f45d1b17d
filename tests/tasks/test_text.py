"""Language modelling on text: every token is predicted once, every byte is counted once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scoring import corpus_of, scoring_of, tokenizer_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmkit.data.tokenizer import train_tokenizer
from llmkit.tasks.base import Encoded, TaskSettings
from llmkit.tasks.text import TextTask

TEXTS = [
    "The apple is green.",
    "x" * 300,
    "Grüße, 世界 🎉👩‍👩‍👧 and more",
    "  white space around it  \n\n",
    "a",
    "one\r\ntwo\0three",
    "word " * 100,
]


def plain() -> Any:
    return train_tokenizer(["The apple is green and the river is quiet."] * 5, "bpe", 300)


def with_bos() -> Any:
    tokenizer = plain()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def with_eos() -> Any:
    tokenizer = plain()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    return tokenizer


def trimming() -> Any:
    """Byte-level with offsets that leave white space out, as GPT-2's and Llama 3's do."""
    tokenizer = plain()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def words() -> Any:
    """White space is lost, as in BERT."""
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "The": 2, "apple": 3, "a": 4, "word": 5}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>")


def without_end() -> Any:
    tokenizer = plain()
    tokenizer.eos_token = None
    return tokenizer


TOKENIZERS = [plain, with_bos, with_eos, trimming, words, without_end]


@pytest.mark.parametrize("max_length", [2, 3, 7, 16, 1000])
@pytest.mark.parametrize("make", TOKENIZERS)
def test_windows_predict_every_token_once_and_count_every_byte_once(make: Any, max_length: int) -> None:
    tokenizer = make()
    task = TextTask(tokenizer, TaskSettings(max_length))
    for text, encoded in zip(TEXTS, task.encode([{"text": text} for text in TEXTS]), strict=True):
        ids = tokenizer(text)["input_ids"]
        if tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        if len(ids) < 2:
            assert encoded == "text has fewer than two tokens: nothing to predict"
            continue
        assert isinstance(encoded, Encoded)
        assert encoded.lost_tokens == 0
        predicted: list[int] = []
        for example in encoded.examples:
            assert 2 <= len(example["input_ids"]) <= max_length
            assert not example["supervised"][0]
            assert example["supervised"][1:].all()
            assert example["input_ids"][0] == (ids[0] if not predicted else predicted[-1]), "the token before"
            predicted += example["input_ids"][1:].tolist()
        assert predicted == ids[1:]
        counted = sum(example["text_bytes"] for example in encoded.examples)
        first = len(text.encode()) - counted  # what the document's first token stands for, which nothing predicts
        if tokenizer.bos_token_id is not None:
            assert first == 0
        else:
            assert 0 <= first <= len(text.encode())
            whole = TextTask(tokenizer, TaskSettings(10_000)).encode([{"text": text}])[0]
            assert isinstance(whole, Encoded)
            assert counted == whole.examples[0]["text_bytes"], "the same in windows of any size"


def test_the_bytes_of_the_first_token_alone_are_missing() -> None:
    task = TextTask(plain(), TaskSettings(100))
    for text in ("apple is", "世界"):
        [encoded] = task.encode([{"text": text}])
        assert isinstance(encoded, Encoded)
        expected = len(task.tokenizer.tokenize(text)[0])  # each character of a byte-level token is a byte
        assert sum(e["text_bytes"] for e in encoded.examples) == len(text.encode()) - expected


@pytest.mark.parametrize("make", [trimming, words, plain])
def test_white_space_that_a_tokenizer_trims_counts_all_the_same(make: Any) -> None:
    task = TextTask(make(), TaskSettings(4))
    text = "apple  The   a \n\n"
    [encoded] = task.encode([{"text": text}])
    assert isinstance(encoded, Encoded)
    first = task.tokenizer(text, return_offsets_mapping=True)["offset_mapping"][0][1]
    assert sum(example["text_bytes"] for example in encoded.examples) == len(text) - first


def test_scores_are_those_by_hand(tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    task = TextTask(tokenizer, TaskSettings(24))
    texts = [text for text in TEXTS if len(tokenizer(text)["input_ids"]) < 60]
    corpus = corpus_of(task, tmp_path / "corpus", [{"text": text} for text in texts])
    nats, tokens, text_bytes = 0.0, 0, 0
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        text_bytes += len(text.encode()) - len(tokenizer.decode(ids[:1]).encode())
        for start in range(0, len(ids) - 1, 23):
            window = torch.tensor([ids[start : start + 24]])
            with torch.no_grad():
                logits = model(window).logits[0, :-1].double()
            nats -= logits.log_softmax(-1).gather(1, window[0, 1:, None]).sum().item()
            tokens += window.shape[1] - 1
    if "世" in "".join(texts):
        assert any(len(text) != len(text.encode()) for text in texts)
    for size in (1, 4, 50):
        done: list[int] = []
        scoring = scoring_of(task, batch_size=size, advance=done.append)
        metrics = task.evaluate(model, corpus, scoring).metrics
        assert metrics["loss"] == pytest.approx(nats / tokens, abs=1e-5)
        assert metrics["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
        assert sum(done) == task.work(corpus, scoring) == len(corpus)
    assert set(task.evaluate(model, corpus, scoring_of(task, metrics=("loss",))).metrics) == {"loss"}


def test_token_sums_equal_brute_force(tiny_llama: Path, tmp_path: Path) -> None:
    task = TextTask(tokenizer_of(tiny_llama), TaskSettings(24))
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    corpus = corpus_of(task, tmp_path / "corpus", [{"text": text} for text in TEXTS[:3]])
    loss, right, count = 0.0, 0, 0
    for example in corpus:
        ids = torch.tensor(np.asarray(example["input_ids"], np.int64))
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        for place in range(1, len(ids)):
            if example["supervised"][place]:
                loss -= logits[place - 1].double().log_softmax(-1)[ids[place]].item()
                right += int(logits[place - 1].argmax() == ids[place])
                count += 1
    sums = {"loss": 0.0, "correct": 0.0, "tokens": 0.0}
    for _, fields in task.predict(model, corpus, np.arange(len(corpus)), scoring_of(task)):
        sums = {name: sums[name] + float(fields[name].sum()) for name in sums}
    assert sums["loss"] == pytest.approx(loss, rel=1e-5)
    assert (sums["correct"], sums["tokens"]) == (right, count)


def test_text_of_single_tokens_has_no_bits_per_byte(tiny_llama: Path, tmp_path: Path) -> None:
    task = TextTask(tokenizer_of(tiny_llama), TaskSettings(24))
    corpus = corpus_of(task, tmp_path / "corpus", [{"text": "a"}, {"text": "b"}])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    assert set(task.evaluate(model, corpus, scoring_of(task)).metrics) == {"loss", "perplexity"}
