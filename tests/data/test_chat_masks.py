"""Exactly the answers are supervised: each with its end token and nothing else, or the conversation is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llmkit.data.chat import ChatRenderer
from llmkit.data.tokenizer import train_tokenizer
from llmkit.errors import RecipeError
from llmkit.tasks.base import Encoded, TaskSettings
from llmkit.tasks.chat import ChatTask

Messages = list[dict[str, Any]]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}"
    "{{- bos_token }}{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
MISTRAL_LATER = MISTRAL.replace(
    "loop.last and", "message == (loop_messages | selectattr('role', 'equalto', 'user') | list)[-1] and"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN_3 = (
    "{%- set ns = namespace(last=-1) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{%- set content = message.content %}"
    "{%- set reasoning = '' %}{%- if '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + reasoning + '\n</think>\n\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@lru_cache
def byte_level(special: tuple[str, ...], eos: str, bos: str | None = None, *, swallow: bool = False) -> Any:
    """A byte-level BPE tokenizer; `swallow`: marks take the white space after them, as those of Phi-3 do."""
    from tokenizers import AddedToken

    tokenizer = train_tokenizer(
        ["the answer is user assistant end\n\n\n\nsystem\n\n"] * 5 + ["hello  world"] * 5, "bpe", 330
    )
    marks = [AddedToken(text, special=True, normalized=False, rstrip=swallow) for text in special]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": marks, "eos_token": eos} | ({"bos_token": bos} if bos else {})
    )
    return tokenizer


@lru_cache
def sentencepiece(special: tuple[str, ...], eos: str, bos: str) -> Any:
    """A character vocabulary with byte fallback that writes spaces as ▁ and one before the text, as Llama 2's does."""
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *(chr(code) for code in range(33, 127)), "▁"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(["<unk>", *pieces]))}
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token=bos, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@dataclass(frozen=True)
class Family:
    """A template with a tokenizer for it; `answer` gives what is to be supervised of a turn with this content."""

    name: str
    template: str
    tokenizer: Callable[[], Any]
    answer: Callable[[str], str]
    keeps_white_space: bool = True
    keeps_others: bool = True

    def __str__(self) -> str:
        return self.name


def chatml_tokens() -> Any:
    return byte_level(("<|im_start|>", "<|im_end|>"), "<|im_end|>")


def chatml_answer(content: str) -> str:
    return content + "<|im_end|>"


FAMILIES = [
    Family("chatml", CHATML, chatml_tokens, chatml_answer),
    Family("chatml, default system", CHATML_DEFAULT_SYSTEM, chatml_tokens, chatml_answer),
    Family(
        "llama 2", LLAMA_2, lambda: sentencepiece(("<s>", "</s>"), "</s>", "<s>"), lambda c: f" {c.strip()} </s>", False
    ),
    Family(
        "llama 3",
        LLAMA_3,
        lambda: byte_level(
            ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "<|eot_id|>",
            "<|begin_of_text|>",
        ),
        lambda c: c.strip() + "<|eot_id|>",
        False,
    ),
    Family(
        "mistral",
        MISTRAL,
        lambda: sentencepiece(("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
        lambda c: f" {c}</s>",
    ),
    Family(
        "gemma",
        GEMMA,
        lambda: sentencepiece(("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
        lambda c: c.strip() + "<end_of_turn>",
        False,
    ),
    Family(
        "phi 3",
        PHI_3,
        lambda: byte_level(("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"), "<|endoftext|>"),
        lambda c: c + "<|end|>",
    ),
    Family("qwen 3", QWEN_3, chatml_tokens, lambda c: f"<think>\n\n</think>\n\n{c}<|im_end|>", keeps_others=False),
    Family(
        "zephyr",
        ZEPHYR,
        lambda: sentencepiece(("<s>", "</s>"), "</s>", "<s>"),
        lambda c: f"{c}</s>",
    ),
    Family("marks", MARKED, chatml_tokens, chatml_answer),
    Family("marks without the end", MARKED_WITHOUT_END, chatml_tokens, chatml_answer),
]


def exchange(*contents: str) -> Messages:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def supervised(template: str, tokenizer: Any, messages: Messages, max_length: int = 4096) -> list[list[str]]:
    """For each example of a conversation its runs of supervised tokens, decoded. Raises ValueError when refused."""
    [encoded] = ChatTask(tokenizer, TaskSettings(max_length, template)).encode([{"messages": messages}])
    if not isinstance(encoded, Encoded):
        raise ValueError(encoded)
    found = []
    for example in encoded.examples:
        runs: list[list[int]] = [[]]
        for token, chosen in zip(example["input_ids"], example["supervised"], strict=True):
            if chosen:
                runs[-1].append(token)
            elif runs[-1]:
                runs.append([])
        found.append([tokenizer.decode(run) for run in runs if run])
    return found


CONTENTS = [
    "hello world",
    "end",
    "assistant",
    "user",
    "<",
    "<|",
    "|>",
    "\\n",
    "model\nassistant\nhello",
    "<|im_start",
    "[/INST",
    "im_end",
    "{{ messages }} {% generation %}",
    "Grüße, 世界 🎉👩‍👩‍👧",
    "ends with 🎉",
    "🎉",
    "a\n\nb\n",
    "x",
]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_one_answer_is_supervised_with_its_end_and_nothing_else(family: Family, content: str) -> None:
    found = supervised(family.template, family.tokenizer(), exchange("What is it?", content))
    assert found == [[family.answer(content)]]


@pytest.mark.parametrize("content", [" hello", "  hello", "hello ", "hello\n", " hello \n ", "\thello"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.keeps_white_space], ids=str)
def test_white_space_around_an_answer_is_supervised_where_the_template_keeps_it(family: Family, content: str) -> None:
    found = supervised(family.template, family.tokenizer(), exchange("What is it?", content))
    if content.startswith("\t"):  # a token may join a template's line break and the answer's tab; visible text never
        assert [[text.lstrip() for text in texts] for texts in found] == [[family.answer(content).lstrip()]]
    else:
        assert found == [[family.answer(content)]]


@pytest.mark.parametrize("content", [" hello", "hello\n", "\n\n hello \n "])
@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.keeps_white_space], ids=str)
def test_a_template_that_strips_answers(family: Family, content: str) -> None:
    found = supervised(family.template, family.tokenizer(), exchange("What is it?", content))
    assert found == [[family.answer("hello")]]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.keeps_others], ids=str)
def test_all_answers_of_a_conversation_are_supervised(family: Family) -> None:
    messages = exchange("one?", "first", "two?", "first", "three?", "third one")
    found = supervised(family.template, family.tokenizer(), messages)
    assert found == [[family.answer(text) for text in ("first", "first", "third one")]]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.keeps_others], ids=str)
def test_turns_marked_with_train_false_are_left_out(family: Family) -> None:
    messages = exchange("one?", "first", "two?", "second", "three?", "third")
    messages[3]["train"] = False
    assert supervised(family.template, family.tokenizer(), messages) == [
        [family.answer("first"), family.answer("third")]
    ]
    messages[1]["train"] = messages[5]["train"] = False
    with pytest.raises(ValueError, match="no assistant turn to learn from"):
        supervised(family.template, family.tokenizer(), messages)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.name not in ("gemma", "mistral")], ids=str)
def test_a_system_turn_is_not_supervised(family: Family) -> None:
    messages = [{"role": "system", "content": "Be brief, assistant."}, *exchange("one?", "first")]
    assert supervised(family.template, family.tokenizer(), messages) == [[family.answer("first")]]


def test_what_stands_after_the_last_answer_is_not_supervised() -> None:
    messages = exchange("one?", "first", "two?")
    assert supervised(CHATML, chatml_tokens(), messages) == [["first<|im_end|>"]]


def test_a_template_that_moves_the_system_turn_gives_one_example_an_answer() -> None:
    tokenizer = next(family for family in FAMILIES if family.name == "mistral").tokenizer()
    messages = [{"role": "system", "content": "Brief."}, *exchange("one?", "first", "two?", "second")]
    assert supervised(MISTRAL_LATER, tokenizer, messages) == [[" first</s>"], [" second</s>"]]
    with pytest.raises(ValueError, match="does not show where the answer starts"):
        supervised(MISTRAL, tokenizer, messages)  # writes the system turn before an answer, and not with it


def test_a_template_that_drops_earlier_thinking_gives_one_example_an_answer() -> None:
    thought = "<think>\nhm, {}\n</think>\n\n{}"
    messages = exchange("one?", thought.format("a", "first"), "two?", thought.format("b", "second"))
    found = supervised(QWEN_3, chatml_tokens(), messages)
    assert found == [[thought.format("a", "first") + "<|im_end|>"], [thought.format("b", "second") + "<|im_end|>"]]
    task = ChatTask(chatml_tokens(), TaskSettings(4096, QWEN_3))
    [encoded] = task.encode([{"messages": messages}])
    assert isinstance(encoded, Encoded)
    last = task.tokenizer.decode(encoded.examples[1]["input_ids"])
    assert "hm, a" not in last, "the second example is rendered as the model would see it"
    assert "first" in last


def test_marks_that_swallow_white_space_are_not_supervised() -> None:
    marks = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    tokenizer = byte_level(marks, "<|endoftext|>", swallow=True)
    for content in ("hello", " hello", "\n\nhello"):
        [[text]] = supervised(PHI_3, tokenizer, exchange("one?", content))
        assert text == "hello<|end|>"


def test_a_line_break_joined_to_the_template_is_not_supervised_but_a_joined_word_is() -> None:
    [[text]] = supervised(CHATML, chatml_tokens(), exchange("one?", "\n\n\nhello"))
    assert text.lstrip("\n") == "hello<|im_end|>"
    assert text.count("\n") <= 3, "nothing of the template's own line break"
    spaced = CHATML.replace("assistant\n' }}", "assistant: ' }}").replace(
        "message['role'] + '\n'", "message['role'] + (': ' if message['role'] == 'assistant' else '\n')"
    )
    [[text]] = supervised(spaced, chatml_tokens(), exchange("one?", "world"))
    assert text.lstrip() == "world<|im_end|>"


def test_a_cut_answer_keeps_what_fits_and_a_lost_one_is_refused() -> None:
    tokenizer = chatml_tokens()
    messages = exchange("one?", "hello world hello world")
    whole = len(tokenizer(ChatRenderer(tokenizer, CHATML).prompt(messages[:1]))["input_ids"])
    assert supervised(CHATML, tokenizer, messages, whole + 2)[0][0] in "hello world hello world"
    with pytest.raises(ValueError, match="no answer within the first"):
        supervised(CHATML, tokenizer, messages, whole)


NO_END = CHATML.replace("+ '<|im_end|>' ", "")
ONE_END = (  # <|im_end|> only at the end of all: what ends an earlier answer is the mark of the next turn
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}"
)
REFUSED = {
    "no end token": (NO_END, "does not end an answer with a special token"),
    "no end token, marked": (MARKED.replace("<|im_end|>", ""), "does not end an answer with a special token"),
    "ended by the next turn, marked": (ONE_END, "does not end an answer with a special token"),
    "other generation prompt": (
        CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"),
        "does not show where the answer starts",
    ),
    "no generation prompt": (CHATML.split("{% if add")[0], "no generation prompt, and writes `<|im_start|>assistant`"),
    "answer in capitals": (CHATML.replace("message['content']", "message['content'] | upper"), "as it was written"),
    "answer cut": (CHATML.replace("message['content']", "message['content'][:3]"), "as it was written"),
    "marks nothing": (MARKED.replace("== 'assistant' %}", "== 'bot' %}", 1), "marks 0 answers, the conversation has 2"),
    "raises": ("{{ raise_exception('no such role') }}", "refuses the conversation: no such role"),
    "marks and raises": (MARKED + "{{ raise_exception('no such role') }}", "refuses the conversation: no such role"),
    "syntax": ("{% for message in %}", "refuses the conversation"),
    "fails": ("{{ messages[0].nothing.nothing }}", "refuses the conversation"),
    "reaches for the machine": (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "refuses the conversation: .*unsafe",
    ),
    "imports": (
        "{{ cycler.__init__.__globals__.os.system('touch /tmp/llmkit-was-here') }}",
        "refuses the conversation: .*unsafe",
    ),
    "changes the messages": ("{{ messages.append(1) }}" + CHATML, "refuses the conversation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_tell_is_refused_with_the_reason(name: str) -> None:
    template, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        supervised(template, chatml_tokens(), exchange("one?", "the first", "two?", "the second"))


def test_a_marked_answer_is_not_ended_by_the_mark_of_the_next_turn() -> None:
    with pytest.raises(ValueError, match="does not end an answer"):
        supervised(ONE_END.replace("{{ '<|im_end|>' }}", ""), chatml_tokens(), exchange("one?", "first", "two?"))


def test_without_a_template_the_recipe_key_is_named() -> None:
    with pytest.raises(RecipeError) as caught:
        ChatRenderer(byte_level((), "<|end|>"))
    assert caught.value.where == "data.chat_template"
    assert ChatRenderer(byte_level((), "<|end|>"), CHATML).template == CHATML


def test_a_bad_row_does_not_disturb_its_neighbours() -> None:
    good, bad = {"messages": exchange("one?", "first")}, {"messages": exchange("one?")}
    task = ChatTask(chatml_tokens(), TaskSettings(4096, CHATML))
    alone, *_ = task.encode([good])
    first, reason, last = task.encode([good, bad, good])
    assert reason == "no assistant turn to learn from"
    assert isinstance(alone, Encoded)
    assert isinstance(first, Encoded)
    assert isinstance(last, Encoded)
    for encoded in (first, last):
        assert encoded.examples[0]["input_ids"] == alone.examples[0]["input_ids"]
        assert (encoded.examples[0]["supervised"] == alone.examples[0]["supervised"]).all()
    assert task.encode([bad, bad]) == ["no assistant turn to learn from"] * 2
