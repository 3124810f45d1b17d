"""Scores of conversations, by hand; answers do not depend on what else is in the batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from scoring import WORDS, corpus_of, scoring_of, sentence, tokenizer_of
from transformers import AutoModelForCausalLM

from llmkit.errors import RecipeError
from llmkit.tasks.base import TaskSettings
from llmkit.tasks.chat import ChatTask


def row(number: int, turns: int = 1) -> dict[str, Any]:
    messages = []
    for turn in range(turns):
        question = " ".join(sentence(number + 7 * part) for part in range(1 + number % 3))
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"{WORDS[number % 12]} {WORDS[turn]}"},
        ]
    return {"messages": messages}


ROWS = [row(number, 1 + number % 2) for number in range(10)]


@pytest.fixture
def task(tiny_llama: Path) -> ChatTask:
    return ChatTask(tokenizer_of(tiny_llama), TaskSettings(256))


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    """With weights so large that different prompts have different answers."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def test_scores_are_those_by_hand(task: ChatTask, model: Any, tmp_path: Path) -> None:
    corpus = corpus_of(task, tmp_path / "corpus", ROWS)
    nats, right, count = 0.0, 0, 0
    for conversation in ROWS:
        ids: list[int] = []
        answer: list[bool] = []
        for message in conversation["messages"]:
            head = task.tokenizer(f"<|im_start|>{message['role']}\n")["input_ids"]
            body = task.tokenizer(message["content"] + "<|im_end|>")["input_ids"]
            tail = task.tokenizer("\n")["input_ids"]
            ids += head + body + tail
            answer += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False] * len(tail)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        for place, chosen in enumerate(answer):
            if chosen:
                nats -= logits[place - 1].log_softmax(-1)[ids[place]].item()
                right += int(logits[place - 1].argmax() == ids[place])
                count += 1
    for size in (1, 3, 50):
        metrics = task.evaluate(model, corpus, scoring_of(task, batch_size=size, generate=0, samples=0)).metrics
        assert metrics["loss"] == pytest.approx(nats / count, rel=1e-5)
        assert metrics["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
        assert metrics["token_accuracy"] == right / count
        assert "rougeL" not in metrics


def one_at_a_time(task: ChatTask, model: Any, prompt: list[int], count: int) -> str:
    """Greedy, without padding, cache or generate."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == task.tokenizer.eos_token_id:
                break
            ids.append(token)
    return str(task.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_in_a_batch_are_those_one_at_a_time(
    task: ChatTask, model: Any, tmp_path: Path, batch_size: int
) -> None:
    corpus = corpus_of(task, tmp_path / "corpus", ROWS)
    model.generation_config.repetition_penalty = 5.0  # would count the padding of shorter prompts
    done: list[int] = []
    scoring = scoring_of(task, batch_size=batch_size, generate=10, samples=10, advance=done.append)
    scores = task.evaluate(model, corpus, scoring)
    assert sum(done) == task.work(corpus, scoring) == 20
    expected = []
    for sample, conversation in zip(scores.samples, ROWS, strict=True):
        messages = conversation["messages"]
        prompt = task.tokenizer(task.renderer.prompt(messages[:-1]))["input_ids"]
        assert sample["prompt"] == task.tokenizer.decode(prompt).strip()
        assert sample["reference"] == messages[-1]["content"]
        expected.append(one_at_a_time(task, model, prompt, 8))
    assert [sample["answer"] for sample in scores.samples] == expected
    assert len(set(expected)) > 3, "the answers differ"
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    by_hand = [scorer.score(s["reference"], s["answer"])["rougeL"].fmeasure for s in scores.samples]
    assert scores.metrics["rougeL"] == pytest.approx(np.mean(by_hand))


def test_an_answer_ends_at_the_end_token_and_only_there(task: ChatTask, model: Any, tmp_path: Path) -> None:
    """The last token of an answer that was cut at max_length does not end the answers of the others."""
    whole = corpus_of(task, tmp_path / "whole", ROWS)
    scoring = scoring_of(task, generate=10, samples=10)
    before = {s["prompt"]: s["answer"] for s in task.evaluate(model, whole, scoring).samples}
    common = task.tokenizer(next(text for text in before.values() if len(text) > 3))["input_ids"][0]
    long = {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": task.tokenizer.decode([common]) * 300},
        ]
    }
    cut = corpus_of(task, tmp_path / "cut", [*ROWS, long])
    assert int(cut[10]["input_ids"][-1]) != task.tokenizer.eos_token_id
    after = {
        s["prompt"]: s["answer"] for s in task.evaluate(model, cut, scoring_of(task, generate=11, samples=11)).samples
    }
    assert {prompt: after[prompt] for prompt in before} == before


def test_the_token_that_ends_a_turn_ends_an_answer_even_when_the_model_does_not_say_so(
    task: ChatTask, model: Any, tmp_path: Path
) -> None:
    model.generation_config.eos_token_id = None
    end = task.tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[end] = 0.0

    def always_end(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., end] = 1e4
        return output

    hook = model.lm_head.register_forward_hook(always_end)
    corpus = corpus_of(task, tmp_path / "corpus", ROWS)
    answers = [s["answer"] for s in task.evaluate(model, corpus, scoring_of(task, generate=10, samples=10)).samples]
    hook.remove()
    assert answers == [""] * 10


def test_a_prompt_that_leaves_less_room_has_a_shorter_answer_and_the_others_a_whole_one(
    task: ChatTask, tiny_llama: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    width = len(task.tokenizer)
    narrow = GPT2LMHeadModel(GPT2Config(vocab_size=width, n_embd=32, n_layer=1, n_head=2, n_positions=60)).eval()
    narrow.generation_config.eos_token_id = task.tokenizer.eos_token_id
    with torch.no_grad():
        for parameter in narrow.parameters():
            parameter.normal_(std=0.5)
    fitted = ChatTask(task.tokenizer, TaskSettings(60))
    rows = [row(0), row(3), row(2)]
    filler = len(fitted.encode(rows)[2].examples[0]["input_ids"])  # type: ignore[union-attr]
    assert 45 < filler <= 60, "a prompt that leaves little room"
    corpus = corpus_of(fitted, tmp_path / "corpus", rows)
    scores = fitted.evaluate(narrow, corpus, scoring_of(fitted, max_new_tokens=30, generate=3, samples=3))
    for sample, conversation in zip(scores.samples, rows, strict=True):
        prompt = task.tokenizer(task.renderer.prompt(conversation["messages"][:-1]))["input_ids"]
        assert sample["answer"] == one_at_a_time(task, narrow, prompt, min(30, 60 - len(prompt)))


def test_samples_and_answers_as_asked(task: ChatTask, model: Any, tmp_path: Path) -> None:
    corpus = corpus_of(task, tmp_path / "corpus", ROWS)
    scores = task.evaluate(model, corpus, scoring_of(task, generate=8, samples=3))
    assert len(scores.samples) == 3
    done: list[int] = []
    scoring = scoring_of(task, metrics=("loss",), generate=8, samples=2, advance=done.append)
    scores = task.evaluate(model, corpus, scoring)
    assert (set(scores.metrics), len(scores.samples)) == ({"loss"}, 2)
    assert sum(done) == task.work(corpus, scoring) == 12


def test_what_decided_the_encoding_is_described(task: ChatTask) -> None:
    described = task.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["template"] == task.tokenizer.chat_template
    assert described["answers_found_by"] == "comparing prefixes of the rendered text"
    other = ChatTask(task.tokenizer, TaskSettings(256, "{% generation %}x{% endgeneration %}"))
    assert other.describe() != described


def test_a_tokenizer_that_knows_no_characters_is_refused(task: ChatTask) -> None:
    class Slow:
        is_fast, pad_token_id, eos_token_id = False, 0, 1

    with pytest.raises(RecipeError, match="cannot say which characters"):
        ChatTask(Slow(), TaskSettings(8))
