"""Text classification. Metrics: loss, accuracy, macro precision, recall and F1, with a confusion matrix and F1 by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from llmkit.data.batches import by_length
from llmkit.data.corpus import Column, Corpus, Example, smallest_unsigned
from llmkit.errors import DataError
from llmkit.metrics.classification import classification_scores
from llmkit.tasks.base import Batch, Encoded, Scores, Scoring, TaskSettings


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
        cut = self.tokenizer(texts, truncation=True, max_length=self.settings.max_length, verbose=False)["input_ids"]
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

    def collate(self, examples: Sequence[Example]) -> Batch:
        """`input_ids` and `attention_mask` (B, T), padded on the right, and `labels` (B,)."""
        width = max(len(example["input_ids"]) for example in examples)
        ids = np.full((len(examples), width), self.pad_id, np.int64)
        mask = np.zeros((len(examples), width), np.int64)
        for row, example in enumerate(examples):
            ids[row, : len(example["input_ids"])] = example["input_ids"]
            mask[row, : len(example["input_ids"])] = 1
        labels = np.array([example["label"] for example in examples], np.int64)
        return {
            name: torch.from_numpy(a) for name, a in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
        }

    def count(self, batch: Batch) -> int:
        """The number of texts."""
        return len(batch["labels"])

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The summed cross entropy of the labels, in nats."""
        return F.cross_entropy(self._logits(model, batch), batch["labels"], reduction="sum")

    def work(self, corpus: Corpus, scoring: Scoring) -> int:
        """Each example is scored once."""
        return len(corpus)

    @torch.inference_mode()
    def evaluate(self, model: Any, corpus: Corpus, scoring: Scoring) -> Scores:
        """Scores over all texts, and for `scoring.samples` of them what the model said."""
        loss = 0.0
        predicted = np.zeros(len(corpus), np.int64)
        for numbers in by_length(corpus.lengths("input_ids"), scoring.batch_size):
            batch = self.collate([corpus[int(i)] for i in numbers])
            batch = {name: tensor.to(scoring.device) for name, tensor in batch.items()}
            with scoring.autocast():
                logits = self._logits(model, batch)
            loss += F.cross_entropy(logits, batch["labels"], reduction="sum").item()
            predicted[numbers] = logits.argmax(dim=-1).cpu().numpy()
            scoring.advance(len(numbers))
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

    def _logits(self, model: Any, batch: Batch) -> torch.Tensor:
        """(B, C) in fp32."""
        logits: torch.Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.float()
        return logits
