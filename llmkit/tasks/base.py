"""What a task is: how a row becomes model inputs, which model and loss, which metrics.

Shapes: B examples of a batch, T tokens, V words of the vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch

from llmkit.data.corpus import Column, Corpus, Example

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TaskSettings:
    """What a recipe and its data say to a task; kept with the corpus."""

    max_length: int
    chat_template: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """One row as examples; `lost_tokens` of it were cut off because they went beyond max_length."""

    examples: list[Example]
    lost_tokens: int = 0


@dataclass(frozen=True)
class Scoring:
    """How a model is to be scored."""

    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    batch_size: int
    metrics: tuple[str, ...]
    generate: int
    max_new_tokens: int
    samples: int
    advance: Callable[[int], None] = lambda done: None

    def wants(self, *names: str) -> bool:
        """True when one of these metrics was asked for."""
        return any(name in self.metrics for name in names)


@dataclass(frozen=True)
class Scores:
    """A model's scores: numbers, tables beside them (a confusion matrix), and answers to look at."""

    metrics: dict[str, float]
    tables: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)


class Task(Protocol):
    """A task; made with a tokenizer (or processor) and its settings."""

    kind: ClassVar[str]  # of canonical row: text, chat or labelled
    auto_class: ClassVar[str]  # of Transformers, by name
    metrics: ClassVar[tuple[str, ...]]  # in the order in which they are shown
    shaped_by_data: ClassVar[bool]  # the model has a shape (labels) that only the data tell
    size_column: ClassVar[str]  # the ragged column whose length says how much work an example is

    tokenizer: Any

    def __init__(self, tokenizer: Any, settings: TaskSettings) -> None:
        """Raises RecipeError when the tokenizer or the labels do not fit the task."""

    @property
    def columns(self) -> Mapping[str, Column]:
        """The columns of this task's corpus."""

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Encoded | str]:
        """For each canonical row its examples, or the reason why it cannot be used."""

    def describe(self) -> dict[str, Any]:
        """What decides how rows were encoded, beside the rows: part of the corpus's identity. JSON values."""

    def model_changes(self, config: Any) -> dict[str, Any]:
        """Changes to a model's config that this task needs, such as the number of labels."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Examples as padded tensors on the CPU."""

    def count(self, batch: Batch) -> int:
        """How many things of a batch are supervised: the loss is divided by their number over the global batch."""

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The sum of the losses of all supervised things, a scalar in fp32."""

    def work(self, corpus: Corpus, scoring: Scoring) -> int:
        """How many times `evaluate` will say that an example is done: once when scored, once when answered."""

    def evaluate(self, model: Any, corpus: Corpus, scoring: Scoring) -> Scores:
        """The model's scores on a corpus of this task."""
