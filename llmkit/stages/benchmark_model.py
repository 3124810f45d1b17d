"""A loaded model as lm-eval sees it: its own Hugging Face backend, with log-likelihoods from packed rows.

Importing this imports lm-eval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM

from llmkit.model.precision import autocast
from llmkit.tasks.base import Regularisation
from llmkit.tasks.causal import CausalTask

_MOST_TOKENS = 4096  # of a packed row
_WORTH_A_BATCH = 128  # tokens that are computed twice rather than in a row of their own
Watch = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # title, requests -> advance


class BenchmarkModel(HFLM):
    """lm-eval's Hugging Face backend over a model that is loaded already.

    Where a model can pack, what requests begin with (a question, its examples) is computed once for all of them, and
    logits only for the tokens that are scored; the sums are those of the backend but for rounding.
    """

    def __init__(self, model: Any, tokenizer: Any, *, batch_size: int, precision: str, watch: Watch) -> None:
        half = "float16" if precision == "fp16" else None
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, mixed_precision_dtype=half
        )
        self._precision, self._watch = precision, watch
        self._advance: Callable[[int], None] = lambda done: None
        objective = CausalTask.objective_of(model, 0, Regularisation())
        self._objective = objective if objective.causal.shares else None
        self.cut = 0  # requests that were longer than the model can take

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's, watched."""
        with self._watch("continuations", len(requests)) as self._advance:
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's, watched."""
        with self._watch("windows of text", 0) as self._advance:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval's, watched."""
        with self._watch("answers", len(requests)) as self._advance:
            return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Any, *arguments: Any, **named: Any) -> Any:
        written = super()._model_generate(context, *arguments, **named)
        self._advance(len(context))
        return written

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation, in nats, and whether greedy decoding would write it."""
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        scored = [len(continuation) for _, _, continuation in requests]
        self.cut += sum(len(c) + n > self.max_length + 1 for (_, c, _), n in zip(requests, scored, strict=True))
        if self._objective is None:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, True, override_bs)
            self._advance(len(requests))
            return found
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        with torch.inference_mode(), self._objective.computing(), autocast(self.device, self._precision):
            for part in batches_by_beginning(rows, _MOST_TOKENS):
                for number, answer in zip(part, self._scores([(rows[n], scored[n]) for n in part]), strict=True):
                    answers[number] = answer
                self._advance(len(part))
        return answers

    def _scores(self, batch: Sequence[tuple[list[int], int]]) -> Iterator[tuple[float, bool]]:
        """Of each row of token ids, the score of its last so many tokens."""
        assert self._objective is not None, "else lm-eval scores"
        examples = [{"input_ids": row, "supervised": np.arange(len(row)) >= len(row) - last} for row, last in batch]
        losses, hits = self._objective.losses_and_hits(self._objective.collate(examples))
        lengths = [last for _, last in batch]
        for loss, hit in zip(losses.split(lengths), hits.split(lengths), strict=True):
            yield -float(loss.sum()), bool(hit.all())


def batches_by_beginning(rows: Sequence[list[int]], most: int) -> Iterator[list[int]]:
    """The numbers of all rows, in batches that begin alike, of at most `most` tokens but for a single row.

    A row joins a batch where that costs little more than a batch of its own: what all rows of one begin with counts once.
    """
    batch: list[int] = []
    shared = total = 0  # tokens that all rows begin with; of all rows
    for number in sorted(range(len(rows)), key=rows.__getitem__):
        row = rows[number]
        if batch:
            # In this order no row between the first and this one has less in common with them.
            common = min(shared, len(row) - 1, _in_common(rows[batch[0]], row))
            together = total + len(row) - len(batch) * common
            apart = total - (len(batch) - 1) * shared + len(row)
            if together > min(most, apart + _WORTH_A_BATCH):
                yield batch
                batch = []
        shared, total = (common, total + len(row)) if batch else (len(row) - 1, len(row))
        batch.append(number)
    if batch:
        yield batch


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
