"""Conversations: the model learns to answer. Metrics on answers: loss, perplexity, token accuracy, ROUGE-L.

ROUGE-L: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
import torch

from llmkit.data.chat import ChatRenderer, Rendered
from llmkit.data.corpus import Corpus, Example
from llmkit.errors import RecipeError
from llmkit.metrics.text import rouge_l
from llmkit.model.loading import longest_input
from llmkit.tasks.base import Encoded, Scores, Scoring, TaskSettings
from llmkit.tasks.causal import CausalTask


class ChatTask(CausalTask):
    """Every assistant turn is supervised, with the token that ends it, and nothing else."""

    kind: ClassVar[str] = "chat"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "perplexity", "token_accuracy", "rougeL")

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

    def work(self, corpus: Corpus, scoring: Scoring) -> int:
        """Each example is scored once, and some are answered."""
        return len(corpus) + self._to_answer(scoring)

    def evaluate(self, model: Any, corpus: Corpus, scoring: Scoring) -> Scores:
        """Scores over all answers; ROUGE-L over `scoring.generate` of them, answered greedily."""
        sums = self.token_sums(model, corpus, scoring)
        loss = sums.loss / sums.tokens
        found = {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": sums.correct / sums.tokens,
        }
        samples = self._answers(model, corpus, self._to_answer(scoring), scoring)
        if scoring.generate and scoring.wants("rougeL"):
            found["rougeL"] = rouge_l([s["reference"] for s in samples], [s["answer"] for s in samples])
        shown = np.linspace(0, len(samples) - 1, min(scoring.samples, len(samples))).astype(int)
        metrics = {name: found[name] for name in self.metrics if name in scoring.metrics and name in found}
        return Scores(metrics, samples=[samples[i] for i in shown])

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

    def _to_answer(self, scoring: Scoring) -> int:
        return scoring.generate if scoring.generate and scoring.wants("rougeL") else scoring.samples

    def _answers(self, model: Any, corpus: Corpus, count: int, scoring: Scoring) -> list[dict[str, str]]:
        """Greedy answers to the last turn of `count` conversations, evenly spaced over the corpus."""
        chosen = np.unique(np.linspace(0, len(corpus) - 1, min(count, len(corpus))).astype(int))
        turns = [_last_answer(corpus[int(i)]) for i in chosen]
        ends = {int(answer[-1]) for _, answer in turns} & self._special_ids()  # an answer that was cut has no end
        reach = longest_input(model.config, self.tokenizer) or sys.maxsize
        rooms = [min(scoring.max_new_tokens, reach - len(prompt)) for prompt, _ in turns]
        answers: dict[int, str] = {}
        order = sorted(range(len(turns)), key=lambda i: (rooms[i], -len(turns[i][0])))
        for room, group in groupby(order, key=lambda i: rooms[i]):
            same = list(group)
            for first in range(0, len(same), scoring.batch_size):
                part = same[first : first + scoring.batch_size]
                written = self._generate(model, [turns[i][0] for i in part], ends, room, scoring)
                answers |= dict(zip(part, written, strict=True))
                scoring.advance(len(part))
        decode = self.tokenizer.decode
        return [
            {
                "prompt": decode(prompt).strip(),
                "reference": decode(reference, skip_special_tokens=True).strip(),
                "answer": answers[i],
            }
            for i, (prompt, reference) in enumerate(turns)
        ]

    @torch.inference_mode()
    def _generate(
        self, model: Any, prompts: list[np.ndarray], ends: set[int], room: int, scoring: Scoring
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
