"""What language modelling and chat share: the next-token loss, and counting right tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from llmkit.data.corpus import Column, Corpus, Example, smallest_unsigned
from llmkit.metrics.statistic import Predictions
from llmkit.model.causal import read_causal_model
from llmkit.model.objective import Batch
from llmkit.tasks.base import Fields, Regularisation, Scores, Scoring, TaskSettings, computed
from llmkit.tasks.causal_objective import CausalObjective, left_padded
from llmkit.tasks.scoring import evaluate


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
        """Each example is scored once, and some are answered."""
        return len(corpus) + len(self.to_answer(corpus, scoring))

    @torch.inference_mode()
    def predict(
        self, model: Any, corpus: Corpus, numbers: np.ndarray, scoring: Scoring
    ) -> Iterator[tuple[list[int], Fields]]:
        """Of each example the summed loss in nats, its supervised tokens, and how many of them the model puts first."""
        objective = scoring.objective or self.objective(model)
        found = computed(objective, corpus, numbers, self.size_column, scoring, objective.losses_and_hits)
        for part, (losses, hits) in found:
            counts = [np.count_nonzero(corpus[number]["supervised"][1:]) for number in part]
            owner = np.repeat(np.arange(len(part)), counts)  # of each supervised token
            loss, correct = (np.bincount(owner, each.double().numpy(), len(part)) for each in (losses, hits))
            yield part, {"loss": loss, "tokens": np.array(counts), "correct": correct.astype(np.int64)}

    def to_answer(self, corpus: Corpus, scoring: Scoring) -> np.ndarray:
        """None."""
        return np.zeros(0, np.int64)

    def stops(self, corpus: Corpus, scoring: Scoring) -> list[int]:
        """None."""
        return []

    def answer(
        self, model: Any, corpus: Corpus, numbers: np.ndarray, scoring: Scoring
    ) -> Iterator[tuple[list[int], list[str]]]:
        """None."""
        yield from ()

    def said(self, predictions: Mapping[str, Any], place: int) -> dict[str, Any]:
        """Sums over the supervised tokens, and the answer where one was written."""
        found: dict[str, Any] = {"loss": float(predictions["loss"][place])}
        found |= {name: int(predictions[name][place]) for name in ("tokens", "correct", "bytes") if name in predictions}
        answer = predictions["answer"][place] if "answer" in predictions else None
        return found | ({} if answer is None else {"answer": answer})

    def samples(self, predictions: Mapping[str, Any], count: int) -> np.ndarray:
        """None."""
        return np.zeros(0, np.int64)

    def tables(self, predictions: Predictions) -> dict[str, Any]:
        """None."""
        return {}

    def evaluate(self, model: Any, corpus: Corpus, scoring: Scoring) -> Scores:
        """The model's scores on a corpus of this task."""
        task: Any = self  # with what its subclasses add
        return evaluate(task, model, corpus, scoring)
