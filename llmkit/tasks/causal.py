"""What language modelling and chat share: left-padded batches, the next-token loss, and counting right tokens.

Shapes: B examples of a batch, T tokens, K last positions whose logits are needed, V words, S supervised tokens.

Batches are padded on the left. Answers then end at the same column, and Transformers' `logits_to_keep=K` computes the
output layer for the last K positions only, in whatever way the model's family scales or caps its logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from llmkit.data.batches import by_length
from llmkit.data.corpus import Column, Corpus, Example, smallest_unsigned
from llmkit.tasks.base import Batch, Scoring, TaskSettings

IGNORED = -100  # the label of a token that is not supervised, as in PyTorch's cross entropy


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

    def collate(self, examples: Sequence[Example]) -> Batch:
        """`input_ids`, `attention_mask`, `position_ids` and `labels`, each (B, T), padded on the left."""
        width = max(len(example["input_ids"]) for example in examples)
        shape = (len(examples), width)
        ids, labels = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        mask = np.zeros(shape, np.int64)
        for row, example in enumerate(examples):
            tokens = np.asarray(example["input_ids"], np.int64)
            start = width - len(tokens)
            ids[row, start:] = tokens
            mask[row, start:] = 1
            labels[row, start:] = np.where(example["supervised"], tokens, IGNORED)
            labels[row, start] = IGNORED  # nothing stands before the first token that could predict it
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        arrays = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def count(self, batch: Batch) -> int:
        """The number of supervised tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The summed cross entropy of the supervised tokens, in nats."""
        logits, targets = self.supervised_logits(model, batch)
        return F.cross_entropy(logits, targets, reduction="sum")

    def supervised_logits(self, model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The fp32 logits (S, V) that predict the supervised tokens, and those tokens (S,)."""
        labels = batch["labels"]
        width = labels.shape[1]
        columns = (labels != IGNORED).any(dim=0).nonzero()
        first = int(columns[0]) if len(columns) else width - 1
        keep = width - first + 1  # from the position before the first supervised token to the last
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        accepted = _forward_arguments(model)
        if "position_ids" not in accepted:
            del inputs["position_ids"]
        options = {"use_cache": False} | ({"logits_to_keep": keep} if "logits_to_keep" in accepted else {})
        logits = model(**inputs, **options).logits[:, -keep:-1]  # (B, K - 1, V): the last predicts what is not there
        wanted = labels[:, first:] != IGNORED
        return logits[wanted].float(), labels[:, first:][wanted]

    def work(self, corpus: Corpus, scoring: Scoring) -> int:
        """Each example is scored once."""
        return len(corpus)

    @torch.inference_mode()
    def token_sums(self, model: Any, corpus: Corpus, scoring: Scoring) -> TokenSums:
        """Loss and right tokens over a whole corpus."""
        loss, correct, tokens = 0.0, 0, 0
        for numbers in by_length(corpus.lengths("input_ids"), scoring.batch_size):
            batch = self.collate([corpus[int(i)] for i in numbers])
            batch = {name: tensor.to(scoring.device) for name, tensor in batch.items()}
            with scoring.autocast():
                logits, targets = self.supervised_logits(model, batch)
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            correct += int((logits.argmax(dim=-1) == targets).sum())
            tokens += len(targets)
            scoring.advance(len(numbers))
        return TokenSums(loss, correct, tokens)


def _forward_arguments(model: Any) -> frozenset[str]:
    """The names that the forward of a model, wrapped for several processes or not, takes."""
    inner = getattr(model, "module", model)
    return frozenset(inspect.signature(inner.forward).parameters)
