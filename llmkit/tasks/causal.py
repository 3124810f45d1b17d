"""What language modelling and chat share: the next-token loss, and counting right tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from llmkit.data.corpus import Column, Corpus, Example, smallest_unsigned
from llmkit.model.causal import read_causal_model
from llmkit.model.objective import Batch
from llmkit.tasks.base import Regularisation, Scoring, TaskSettings, computed
from llmkit.tasks.causal_objective import CausalObjective, left_padded


@dataclass(frozen=True)
class TokenSums:
    """Sums over all supervised tokens of a corpus; `loss` is in nats."""

    loss: float
    correct: int
    tokens: int


class CausalTask:
    """The parts of a task that predicts the next token."""

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    shaped_by_data: ClassVar[bool] = False
    size_column: ClassVar[str] = "input_ids"

    def __init__(self, tokenizer: Any, settings: TaskSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_id: int = pad if pad is not None else 0  # never seen: the attention mask and the labels leave it out

    @property
    def columns(self) -> dict[str, Column]:
        """Token ids, and for each whether the model is to learn it."""
        largest = max(self.tokenizer.get_vocab().values())
        return {"input_ids": Column(smallest_unsigned(largest)), "supervised": Column("bool")}

    def model_changes(self, config: Any) -> dict[str, Any]:
        """None: a causal model fits as it is."""
        return {}

    @classmethod
    def objective_of(cls, model: Any, pad_id: int, regularisation: Regularisation) -> CausalObjective:
        """The next-token loss, in the form that suits the model."""
        return CausalObjective(read_causal_model(model), pad_id, regularisation)

    def objective(self, model: Any, regularisation: Regularisation = Regularisation()) -> CausalObjective:
        """The same with the tokenizer's own padding."""
        return self.objective_of(model, self.pad_id, regularisation)

    def padded(self, examples: Sequence[Example]) -> Batch:
        """Token ids, attention mask and positions, padded on the left: what follows a prompt then starts in one column."""
        return left_padded([np.asarray(example["input_ids"], np.int64) for example in examples], self.pad_id)

    def work(self, corpus: Corpus, scoring: Scoring) -> int:
        """Each example is scored once."""
        return len(corpus)

    @torch.inference_mode()
    def token_sums(self, model: Any, corpus: Corpus, scoring: Scoring) -> TokenSums:
        """Loss and right tokens over a whole corpus."""
        objective = scoring.objective or self.objective(model)

        def sums(batch: Batch) -> tuple[float, int, int]:
            return *objective.loss_and_hits(batch), objective.count(batch)

        loss, correct, tokens = 0.0, 0, 0
        for _, (part, hits, count) in computed(objective, corpus, self.size_column, scoring, sums):
            loss, correct, tokens = loss + part, correct + hits, tokens + count
        return TokenSums(loss, correct, tokens)
