"""A number for each text, such as a rating: learnt by its squared error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from llmkit.data.corpus import Column, Corpus, Example, smallest_unsigned
from llmkit.metrics.statistic import Predictions
from llmkit.model.objective import Batch
from llmkit.tasks.base import Fields, Regularisation, Scoring, TaskSettings, computed
from llmkit.tasks.classify import ClassifyObjective, ClassifyTask


class RegressTask(ClassifyTask):
    """One number for each text; the model's head has one output."""

    kind: ClassVar[str] = "numbered"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "mae", "rmse", "r2", "pearson", "spearman")
    shaped_by_data: ClassVar[bool] = False

    def __init__(self, tokenizer: Any, settings: TaskSettings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_id = pad if pad is not None else 0

    @property
    def columns(self) -> dict[str, Column]:
        """Token ids and the number."""
        ids = Column(smallest_unsigned(max(self.tokenizer.get_vocab().values())))
        return {"input_ids": ids, "target": Column("float64", ragged=False)}

    def describe(self) -> dict[str, Any]:
        """The longest example."""
        return {"max_length": self.settings.max_length, "target": "number"}

    def model_changes(self, config: Any) -> dict[str, Any]:
        """One output, and a padding token where the model names none."""
        changes: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        if getattr(config, "pad_token_id", None) is None:
            changes["pad_token_id"] = self.pad_id
        return changes

    def target(self, row: Mapping[str, Any]) -> dict[str, Any] | str:
        """The number."""
        return {"target": row["number"]}

    @classmethod
    def objective_of(cls, model: Any, pad_id: int, regularisation: Regularisation) -> RegressObjective:
        """The squared error."""
        return RegressObjective(model, pad_id, regularisation)

    @torch.inference_mode()
    def predict(
        self, model: Any, corpus: Corpus, numbers: np.ndarray, scoring: Scoring
    ) -> Iterator[tuple[list[int], Fields]]:
        """Of each text the number that the model says."""
        objective = scoring.objective or self.objective(model)

        def said(batch: Batch) -> np.ndarray:
            found: np.ndarray = objective.logits(model, batch)[:, 0].double().cpu().numpy()
            return found

        for part, found in computed(objective, corpus, numbers, self.size_column, scoring, said):
            yield part, {"predicted": found}

    def predictions(
        self, corpus: Corpus, numbers: np.ndarray, fields: Fields, answers: Mapping[int, str]
    ) -> dict[str, Any]:
        """The numbers, told and found, and the squared error."""
        target, found = np.asarray(corpus.values("target"))[numbers], fields["predicted"]
        told = {"reference": target.tolist(), "answer": found.tolist()}
        return {"loss": (found - target) ** 2, "target": target, "predicted": found, **told}

    def shown(self, corpus: Corpus, number: int) -> dict[str, str]:
        """The text and its number."""
        example = corpus[number]
        text = self.tokenizer.decode(example["input_ids"], skip_special_tokens=True)
        return {"prompt": text, "reference": f"{example['target']:g}"}

    def said(self, predictions: Mapping[str, Any], place: int) -> dict[str, Any]:
        """The number and its squared error."""
        return {name: float(predictions[name][place]) for name in ("loss", "predicted")}

    def samples(self, predictions: Mapping[str, Any], count: int) -> np.ndarray:
        """Evenly spaced."""
        return super().samples({"actual": predictions["target"]}, count)

    def tables(self, predictions: Predictions) -> dict[str, Any]:
        """None."""
        return {}


@dataclass(frozen=True)
class RegressObjective(ClassifyObjective):
    """The squared error of one number a text."""

    def labels(self, examples: Sequence[Example]) -> torch.Tensor:
        """The numbers, (B,) in fp32."""
        return torch.tensor([example["target"] for example in examples], dtype=torch.float32)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The summed squared error."""
        return F.mse_loss(self.logits(model, batch)[:, 0], batch["labels"], reduction="sum")
