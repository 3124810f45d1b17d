"""Text classification. Precision, recall and F1 are macro averages; a confusion matrix and scores by label go with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from llmkit.data.corpus import Column, Corpus, Example, smallest_unsigned
from llmkit.errors import DataError
from llmkit.metrics.calibration import calibration_table
from llmkit.metrics.classification import classification_tables
from llmkit.metrics.statistic import Predictions
from llmkit.model.forward import fast_forward
from llmkit.model.objective import Batch
from llmkit.tasks.base import (
    Encoded,
    Fields,
    Regularisation,
    Scores,
    Scoring,
    TaskSettings,
    computed,
    embedding_noise,
    padded_places,
    padded_rows,
)
from llmkit.tasks.scoring import evaluate, evenly


class ClassifyTask:
    """One label out of `settings.labels` for each text."""

    kind: ClassVar[str] = "labelled"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    metrics: ClassVar[tuple[str, ...]] = (
        *("loss", "accuracy", "precision", "recall", "f1"),
        *("balanced_accuracy", "f1_micro", "roc_auc", "ece", "ece_calibrated"),
    )
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
            target = self.target(row)
            if isinstance(target, str):
                encoded.append(target)
            elif not after:
                encoded.append("text has no token")
            else:
                encoded.append(Encoded([{"input_ids": after, **target}], len(before) - len(after)))
        return encoded

    def target(self, row: Mapping[str, Any]) -> dict[str, Any] | str:
        """What the model is to say of a row, as columns of its example, or why there is nothing."""
        number = self.numbers.get(row["label"])
        if number is None:
            return f"label `{row['label']}` is not among the labels of the training data"
        return {"label": number}

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
    def predict(
        self, model: Any, corpus: Corpus, numbers: np.ndarray, scoring: Scoring
    ) -> Iterator[tuple[list[int], Fields]]:
        """Of each text the log probability of each label, in nats."""
        objective = scoring.objective or self.objective(model)

        def judged(batch: Batch) -> np.ndarray:
            found: np.ndarray = F.log_softmax(objective.logits(model, batch), dim=-1).cpu().numpy()
            return found

        for part, found in computed(objective, corpus, numbers, self.size_column, scoring, judged):
            yield part, {"log_probabilities": found}

    def to_answer(self, corpus: Corpus, scoring: Scoring) -> np.ndarray:
        """None: a label is an answer."""
        return np.zeros(0, np.int64)

    def stops(self, corpus: Corpus, scoring: Scoring) -> list[int]:
        """None."""
        return []

    def answer(
        self, model: Any, corpus: Corpus, numbers: np.ndarray, scoring: Scoring
    ) -> Iterator[tuple[list[int], list[str]]]:
        """None."""
        yield from ()

    def predictions(
        self, corpus: Corpus, numbers: np.ndarray, fields: Fields, answers: Mapping[int, str]
    ) -> dict[str, Any]:
        """The numbers and the names of the labels, told and found, and the loss."""
        actual = np.asarray(corpus.values("label"), np.int64)[numbers]
        found = fields["log_probabilities"].astype(np.float64)
        predicted = found.argmax(axis=1)
        labels = self.settings.labels
        return {
            "loss": -found[np.arange(len(actual)), actual],
            "actual": actual,
            "predicted": predicted,
            "log_probabilities": found,
            "reference": [labels[number] for number in actual],
            "answer": [labels[number] for number in predicted],
        }

    def shown(self, corpus: Corpus, number: int) -> dict[str, str]:
        """The text and its label."""
        example = corpus[number]
        text = self.tokenizer.decode(example["input_ids"], skip_special_tokens=True)
        return {"prompt": text, "reference": self.settings.labels[example["label"]]}

    def said(self, predictions: Mapping[str, Any], place: int) -> dict[str, Any]:
        """The label with its probability, those of all, and the loss."""
        probabilities = np.exp(predictions["log_probabilities"][place])
        label = int(predictions["predicted"][place])
        return {
            "loss": float(predictions["loss"][place]),
            "label": self.settings.labels[label],
            "probability": float(probabilities[label]),
            "probabilities": dict(zip(self.settings.labels, probabilities.tolist(), strict=True)),
        }

    def samples(self, predictions: Mapping[str, Any], count: int) -> np.ndarray:
        """Evenly spaced."""
        return evenly(count, len(predictions["actual"]))

    def tables(self, predictions: Predictions) -> dict[str, Any]:
        """The confusion matrix, scores by label, and accuracy by confidence."""
        tables = classification_tables(predictions["actual"], predictions["predicted"], self.settings.labels)
        return tables | {"calibration": calibration_table(predictions)}

    def evaluate(self, model: Any, corpus: Corpus, scoring: Scoring) -> Scores:
        """The model's scores on a corpus of this task."""
        return evaluate(self, model, corpus, scoring)


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
        labels = self.labels(examples)
        rows = [example["input_ids"] for example in examples]
        lengths = torch.tensor([len(row) for row in rows])
        batch = _right_padded(examples, self.pad_id)
        return batch | {"labels": labels, "lengths": lengths, "places": padded_places(rows)}

    def labels(self, examples: Sequence[Example]) -> torch.Tensor:
        """What is to be said, (B,)."""
        return torch.tensor([example["label"] for example in examples])

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
