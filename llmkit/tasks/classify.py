"""Text classification. Metrics: loss, accuracy, macro precision, recall and F1, with a confusion matrix and F1 by class."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from llmkit.data.corpus import Column, Corpus, Example, smallest_unsigned
from llmkit.errors import DataError
from llmkit.metrics.classification import classification_scores
from llmkit.model.forward import fast_forward
from llmkit.model.objective import Batch
from llmkit.tasks.base import (
    Encoded,
    Regularisation,
    Scores,
    Scoring,
    TaskSettings,
    computed,
    embedding_noise,
    padded_places,
    padded_rows,
)


class ClassifyTask:
    """One label out of `settings.labels` for each text."""

    kind: ClassVar[str] = "labelled"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "precision", "recall", "f1")
    shaped_by_data: ClassVar[bool] = True
    size_column: ClassVar[str] = "input_ids"

    def __init__(self, tokenizer: Any, settings: TaskSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        if len(settings.labels) < 2:
            raise DataError(
                "classification needs two labels or more",
                got=", ".join(settings.labels) or "none",
                hint="look at the label column of the training data",
                where="data.train",
            )
        self.numbers = {label: number for number, label in enumerate(settings.labels)}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_id: int = pad if pad is not None else 0

    @property
    def columns(self) -> dict[str, Column]:
        """Token ids and the number of the label."""
        return {
            "input_ids": Column(smallest_unsigned(max(self.tokenizer.get_vocab().values()))),
            "label": Column(smallest_unsigned(len(self.settings.labels)), ragged=False),
        }

    def describe(self) -> dict[str, Any]:
        """The labels in the order of their numbers, and the longest example."""
        return {"max_length": self.settings.max_length, "labels": list(self.settings.labels)}

    def model_changes(self, config: Any) -> dict[str, Any]:
        """The labels, and a padding token where the model names none (decoders need it to find the last token)."""
        changes: dict[str, Any] = {
            "num_labels": len(self.numbers),
            "id2label": dict(enumerate(self.settings.labels)),
            "label2id": dict(self.numbers),
        }
        if getattr(config, "pad_token_id", None) is None:
            changes["pad_token_id"] = self.pad_id
        return changes

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded | str]:
        """Texts cut at max_length, with the number of their label."""
        texts = [row["text"] for row in rows]
        whole = self.tokenizer(texts, verbose=False)["input_ids"]
        long = [number for number, ids in enumerate(whole) if len(ids) > self.settings.max_length]
        cut = list(whole)
        if long:
            shorter = self.tokenizer(
                [texts[number] for number in long], truncation=True, max_length=self.settings.max_length, verbose=False
            )
            for place, ids in zip(long, shorter["input_ids"], strict=True):
                cut[place] = ids
        encoded: list[Encoded | str] = []
        for row, before, after in zip(rows, whole, cut, strict=True):
            number = self.numbers.get(row["label"])
            if number is None:
                encoded.append(f"label `{row['label']}` is not among the labels of the training data")
            elif not after:
                encoded.append("text has no token")
            else:
                encoded.append(Encoded([{"input_ids": after, "label": number}], len(before) - len(after)))
        return encoded

    @classmethod
    def objective_of(cls, model: Any, pad_id: int, regularisation: Regularisation) -> ClassifyObjective:
        """The cross entropy of the labels."""
        return ClassifyObjective(model, pad_id, regularisation)

    def objective(self, model: Any, regularisation: Regularisation = Regularisation()) -> ClassifyObjective:
        """The same with the tokenizer's own padding."""
        return self.objective_of(model, self.pad_id, regularisation)

    def padded(self, examples: Sequence[Example]) -> Batch:
        """Token ids and attention mask, padded on the right."""
        return _right_padded(examples, self.pad_id)

    def work(self, corpus: Corpus, scoring: Scoring) -> int:
        """Each example is scored once."""
        return len(corpus)

    @torch.inference_mode()
    def evaluate(self, model: Any, corpus: Corpus, scoring: Scoring) -> Scores:
        """Scores over all texts, and for `scoring.samples` of them what the model said."""
        objective = scoring.objective or self.objective(model)

        def judged(batch: Batch) -> tuple[float, np.ndarray]:
            logits = objective.logits(model, batch)
            return F.cross_entropy(logits, batch["labels"], reduction="sum").item(), logits.argmax(dim=-1).cpu().numpy()

        loss, predicted = 0.0, np.zeros(len(corpus), np.int64)
        for numbers, (part, labels) in computed(objective, corpus, self.size_column, scoring, judged):
            loss += part
            predicted[numbers] = labels
        actual = np.asarray(corpus.values("label"), np.int64)
        found, tables = classification_scores(actual, predicted, self.settings.labels)
        found["loss"] = loss / len(corpus)
        shown = np.unique(np.linspace(0, len(corpus) - 1, min(scoring.samples, len(corpus))).astype(int))
        samples = [
            {
                "prompt": self.tokenizer.decode(corpus[int(i)]["input_ids"], skip_special_tokens=True),
                "reference": self.settings.labels[actual[i]],
                "answer": self.settings.labels[predicted[i]],
            }
            for i in shown
        ]
        return Scores({name: found[name] for name in self.metrics if name in scoring.metrics}, tables, samples)


@dataclass(frozen=True)
class ClassifyObjective:
    """The cross entropy of one label a text; texts are padded on the right, (B, T)."""

    model: Any
    pad_id: int
    regularisation: Regularisation
    padded: ClassVar[bool] = True
    why_padded: ClassVar[None] = None

    def computing(self, *, outline: bool = False) -> AbstractContextManager[None]:
        """To be entered around everything that computes with this objective's batches."""
        return fast_forward(self.model, packed=False, outline=outline)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """`input_ids` and `attention_mask` (B, T), and `labels` (B,)."""
        labels = torch.tensor([example["label"] for example in examples])
        rows = [example["input_ids"] for example in examples]
        lengths = torch.tensor([len(row) for row in rows])
        batch = _right_padded(examples, self.pad_id)
        return batch | {"labels": labels, "lengths": lengths, "places": padded_places(rows)}

    def count(self, batch: Batch) -> int:
        """The number of texts."""
        return len(batch["labels"])

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The summed cross entropy of the labels, in nats."""
        smoothing = self.regularisation.label_smoothing if model.training else 0.0
        return F.cross_entropy(self.logits(model, batch), batch["labels"], reduction="sum", label_smoothing=smoothing)

    def logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """(B, C) in fp32."""
        inputs: dict[str, torch.Tensor] = {
            name: batch[name] for name in ("input_ids", "attention_mask") if name in batch
        }
        alpha = self.regularisation.neftune_alpha if model.training else 0.0
        with embedding_noise(model, batch, alpha) if alpha else nullcontext():
            logits: torch.Tensor = model(**inputs).logits.float()
        return logits


def _right_padded(examples: Sequence[Example], pad_id: int) -> Batch:
    ids, mask = padded_rows([example["input_ids"] for example in examples], pad_id)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
