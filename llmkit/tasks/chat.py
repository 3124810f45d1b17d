"""Conversations: the model learns to answer. Metrics of answers that are given, and of answers that it writes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch

from llmkit.catalog import is_own_code
from llmkit.data.chat import ChatRenderer, Rendered
from llmkit.data.corpus import Corpus, Example
from llmkit.errors import RecipeError
from llmkit.model.loading import longest_input
from llmkit.tasks.base import Encoded, Fields, Scoring, TaskSettings
from llmkit.tasks.causal import CausalTask
from llmkit.tasks.scoring import evenly

ON_ANSWERS = ("rougeL", "exact_match", "rouge1", "rouge2", "bleu", "chrf")


class ChatTask(CausalTask):
    """Every assistant turn is supervised, with the token that ends it, and nothing else."""

    kind: ClassVar[str] = "chat"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", *ON_ANSWERS)

    def __init__(self, tokenizer: Any, settings: TaskSettings) -> None:
        super().__init__(tokenizer, settings)
        if not tokenizer.is_fast:
            raise RecipeError(
                "the model's tokenizer cannot say which characters a token stands for",
                got=type(tokenizer).__name__,
                expected="a fast tokenizer (tokenizer.json), which supervision of answers needs",
                hint="convert the tokenizer, or use `task: text`",
            )
        self.renderer = ChatRenderer(tokenizer, settings.chat_template)

    def describe(self) -> dict[str, Any]:
        """The template, the longest example, and how answers are found in it."""
        found_by = "marks in the template" if self.renderer.marks_answers else "comparing prefixes of the rendered text"
        return {
            "max_length": self.settings.max_length,
            "template": self.renderer.template,
            "answers_found_by": found_by,
        }

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded | str]:
        """Conversations as token ids with supervised answers."""
        rendered: list[list[Rendered] | str] = []
        for row in rows:
            try:
                rendered.append(self.renderer.render(row))
            except ValueError as error:
                rendered.append(str(error))
        texts = [part.text for parts in rendered if not isinstance(parts, str) for part in parts]
        if not texts:
            return [reason for reason in rendered if isinstance(reason, str)]
        encodings = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        numbers = iter(range(len(texts)))
        return [
            parts if isinstance(parts, str) else self._encoded(parts, encodings, [next(numbers) for _ in parts])
            for parts in rendered
        ]

    def to_answer(self, corpus: Corpus, scoring: Scoring) -> np.ndarray:
        """`scoring.generate` conversations where a metric wants answers, else of these as many as are shown; evenly spaced."""
        scored = scoring.wants(*ON_ANSWERS) or any(map(is_own_code, scoring.metrics))
        return evenly(scoring.generate if scored else min(scoring.generate, scoring.samples), len(corpus))

    def predictions(
        self, corpus: Corpus, numbers: np.ndarray, fields: Fields, answers: Mapping[int, str]
    ) -> dict[str, Any]:
        """The sums, and of the conversations that were answered the answer and the reference."""
        written = [answers.get(number) for number in numbers.tolist()]
        pairs = zip(numbers.tolist(), written, strict=True)
        references = [None if answer is None else self._reference(corpus[number]) for number, answer in pairs]
        return fields | {"answer": written, "reference": references}

    def shown(self, corpus: Corpus, number: int) -> dict[str, str]:
        """The conversation up to its last answer, and that answer."""
        prompt, reference = _last_answer(corpus[number])
        decode = self.tokenizer.decode
        return {"prompt": decode(prompt).strip(), "reference": decode(reference, skip_special_tokens=True).strip()}

    def samples(self, predictions: Mapping[str, Any], count: int) -> np.ndarray:
        """Some of those that were answered, evenly spaced."""
        answered = [place for place, answer in enumerate(predictions["answer"]) if answer is not None]
        return np.array([answered[place] for place in evenly(count, len(answered))], np.int64)

    def _encoded(self, parts: list[Rendered], encodings: Any, numbers: list[int]) -> Encoded | str:
        examples: list[Example] = []
        lost = 0
        for part, number in zip(parts, numbers, strict=True):
            ids, offsets = encodings["input_ids"][number], encodings["offset_mapping"][number]
            starts, ends = np.array(offsets, np.int64).T
            supervised = np.zeros(len(ids), bool)
            for start, end in part.spans:
                # A token that begins before the answer (a mark that swallows the white space after it, a line break
                # joined to the template's) belongs to it only with some of the answer's visible text.
                visible = end - len(part.text[start:end].lstrip())
                inside = (starts >= start) | (ends > visible)
                supervised |= inside & (ends > start) & (starts < end) & (ends > starts)
            limit = self.settings.max_length
            lost += max(0, len(ids) - limit)
            if supervised[:limit].any():
                examples.append({"input_ids": ids[:limit], "supervised": supervised[:limit]})
        if not examples:
            return f"no answer within the first {self.settings.max_length} tokens (data.max_length)"
        return Encoded(examples, lost)

    def _special_ids(self) -> set[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return {*self.tokenizer.all_special_ids, *(number for number, token in added if token.special)}

    def _reference(self, example: Example) -> str:
        return str(self.tokenizer.decode(_last_answer(example)[1], skip_special_tokens=True)).strip()

    def answer(
        self, model: Any, corpus: Corpus, numbers: np.ndarray, scoring: Scoring
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Greedy answers to the last turn of some conversations; those with as much room go together."""
        ends = self.stops(corpus, scoring)
        turns = {number: _last_answer(corpus[number])[0] for number in numbers.tolist()}
        reach = longest_input(model.config, self.tokenizer) or sys.maxsize
        rooms = {number: min(scoring.max_new_tokens, reach - len(prompt)) for number, prompt in turns.items()}
        order = sorted(turns, key=lambda number: (rooms[number], -len(turns[number])))
        for room, group in groupby(order, key=lambda number: rooms[number]):
            same = list(group)
            for first in range(0, len(same), scoring.batch_size):
                part = same[first : first + scoring.batch_size]
                written = self._generate(model, [turns[number] for number in part], ends, room, scoring)
                scoring.advance(len(part))
                yield part, written

    def stops(self, corpus: Corpus, scoring: Scoring) -> list[int]:
        """The special tokens that the answers end with in the data; one that was cut has no end."""
        chosen = self.to_answer(corpus, scoring).tolist()
        return sorted({int(_last_answer(corpus[number])[1][-1]) for number in chosen} & self._special_ids())

    @torch.inference_mode()
    def _generate(
        self, model: Any, prompts: list[np.ndarray], ends: list[int], room: int, scoring: Scoring
    ) -> list[str]:
        """Greedy continuations, of at most `room` tokens, of a batch of prompts, without the token that ends them."""
        from transformers import GenerationConfig

        if room < 1:
            return [""] * len(prompts)
        batch = self.padded([{"input_ids": prompt} for prompt in prompts])
        known = model.generation_config.eos_token_id
        stops = sorted({*ends, *(known if isinstance(known, list) else [known] if known is not None else [])})
        config = GenerationConfig(  # the model's own penalties would make answers depend on padding
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            max_new_tokens=room,
            eos_token_id=stops,
            pad_token_id=self.pad_id,
        )
        inputs = {name: batch[name].to(scoring.device) for name in ("input_ids", "attention_mask")}
        with scoring.autocast():
            out = model.generate(**inputs, generation_config=config)
        new = out[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _last_answer(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """The tokens before the last run of supervised tokens, and that run."""
    ids, supervised = np.asarray(example["input_ids"], np.int64), np.asarray(example["supervised"])
    end = int(np.flatnonzero(supervised)[-1]) + 1
    start = end
    while start > 0 and supervised[start - 1]:
        start -= 1
    return ids[:start], ids[start:end]
