"""What a task is: how a row becomes model inputs, which model and loss, which metrics.

Shapes: B examples of a batch, T tokens, V words of the vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch

from llmkit.data.batches import by_length
from llmkit.data.corpus import Column, Corpus, Example
from llmkit.data.states import CorpusWithStates
from llmkit.model.objective import Batch, Objective, to_device
from llmkit.model.precision import autocast

_Found = TypeVar("_Found")
Fields = dict[str, np.ndarray]  # by name, of each example a value or a row


@dataclass(frozen=True)
class TaskSettings:
    """What a recipe and its data say to a task; kept with the corpus."""

    max_length: int
    chat_template: str | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Regularisation:
    """What makes training harder so that the model generalises; evaluation does without.

    `label_smoothing` is the share of the target that is spread over all classes (Szegedy et al., 2015:
    https://arxiv.org/abs/1512.00567); `neftune_alpha` the size of the noise on embeddings, 0 for none.
    """

    label_smoothing: float = 0.0
    neftune_alpha: float = 0.0


@dataclass(frozen=True)
class Encoded:
    """One row as examples; `lost_tokens` of it were cut off because they went beyond max_length."""

    examples: list[Example]
    lost_tokens: int = 0


class ObjectiveBehindPrefix(Objective, Protocol):
    """An objective that begins behind a model's frozen prefix where a batch brings the states that leave it."""

    def behind(self, batch: Batch) -> AbstractContextManager[Batch]:
        """What the task's own objective takes of a batch; while entered, its states stand in for the prefix."""


@dataclass(frozen=True)
class Known:
    """What leaves a model's frozen prefix for examples of the corpus that is scored, and the objective that begins there."""

    objective: ObjectiveBehindPrefix
    corpus: CorpusWithStates


@dataclass(frozen=True)
class Scoring:
    """How a model is to be scored; what is `known` is not computed, to the same scores."""

    device: torch.device
    precision: str  # bf16 (the model's parameters are), fp16 or fp32
    batch_size: int
    metrics: tuple[str, ...]
    generate: int
    max_new_tokens: int
    samples: int
    advance: Callable[[int], None] = lambda done: None
    objective: Any = None  # the task's own for this model; the task makes it where it is not given
    known: Known | None = None

    def autocast(self) -> AbstractContextManager[Any]:
        """To be entered around every forward."""
        return autocast(self.device, self.precision)

    def wants(self, *names: str) -> bool:
        """True when one of these metrics was asked for."""
        return any(name in self.metrics for name in names)


@dataclass(frozen=True)
class Scores:
    """A model's scores: numbers, why others have no value, tables (a confusion matrix), and answers to look at."""

    metrics: dict[str, float]
    tables: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


class Task(Protocol):
    """A task; made with a tokenizer (or processor) and its settings."""

    kind: ClassVar[str]  # of canonical row: text, chat or labelled
    auto_class: ClassVar[str]  # of Transformers, by name
    metrics: ClassVar[tuple[str, ...]]  # in the order in which they are shown
    shaped_by_data: ClassVar[bool]  # the model has a shape (labels) that only the data tell
    size_column: ClassVar[str]  # the ragged column whose length says how much work an example is

    tokenizer: Any
    settings: TaskSettings

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

    @classmethod
    def objective_of(cls, model: Any, pad_id: int, regularisation: Regularisation) -> Objective:
        """What training minimises for a model of this task; looks at what the model can do."""

    def objective(self, model: Any, regularisation: Regularisation = Regularisation()) -> Objective:
        """The same with the tokenizer's own padding."""

    def padded(self, examples: Sequence[Example]) -> Batch:
        """Examples as padded rows that any model of this task takes: token ids and attention mask, both (B, T)."""

    def predict(
        self, model: Any, corpus: Corpus, numbers: np.ndarray, scoring: Scoring
    ) -> Iterator[tuple[list[int], Fields]]:
        """What the model makes of some examples, batch by batch: their numbers, and fields of as many values."""

    def to_answer(self, corpus: Corpus, scoring: Scoring) -> np.ndarray:
        """The numbers of the examples to which the model is to write an answer."""

    def stops(self, corpus: Corpus, scoring: Scoring) -> list[int]:
        """The tokens that end an answer, beside those that the model says."""

    def answer(
        self, model: Any, corpus: Corpus, numbers: np.ndarray, scoring: Scoring
    ) -> Iterator[tuple[list[int], list[str]]]:
        """Answers to some of those, batch by batch."""

    def predictions(
        self, corpus: Corpus, numbers: np.ndarray, fields: Fields, answers: Mapping[int, str]
    ) -> dict[str, Any]:
        """Of some examples all that metrics need: `fields` and answers by number, as `predict` and `answer` gave them."""

    def shown(self, corpus: Corpus, number: int) -> dict[str, str]:
        """An example for people: its `prompt` or `text`, and its `reference` where it has one."""

    def said(self, predictions: Mapping[str, Any], place: int) -> dict[str, Any]:
        """What the model said of an example, as JSON values."""

    def samples(self, predictions: Mapping[str, Any], count: int) -> np.ndarray:
        """The places of the examples that are shown with what the model said."""

    def tables(self, predictions: Any) -> dict[str, Any]:
        """Tables beside the scores."""

    def evaluate(self, model: Any, corpus: Corpus, scoring: Scoring) -> Scores:
        """The model's scores on a corpus of this task."""


def computed(
    objective: Objective,
    corpus: Corpus,
    chosen: np.ndarray,
    size_column: str,
    scoring: Scoring,
    compute: Callable[[Batch], _Found],
) -> Iterator[tuple[list[int], _Found]]:
    """What `compute` makes of each batch of some examples, beside their numbers; those of like length go together.

    `compute` takes batches of `objective`, the task's own; meanwhile what is known of the corpus stands in for the prefix.
    """
    known = scoring.known
    collating, source = (known.objective, known.corpus) if known else (objective, corpus)
    begun = known.objective.behind if known else nullcontext
    with collating.computing():
        for some in by_length(corpus.lengths(size_column)[chosen], scoring.batch_size):
            numbers = chosen[some].tolist()
            for part in filter(None, known.corpus.apart(numbers) if known else [numbers]):
                batch = to_device(collating.collate([source[number] for number in part]), scoring.device)
                with scoring.autocast(), begun(batch) as rest:
                    found = compute(rest)
                scoring.advance(len(part))
                yield part, found


def padded_rows(rows: Sequence[Any], pad_id: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Rows of token ids, and an attention mask, both (B, T), padded on the right or on the left."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad_id, np.int64), np.zeros((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def padded_places(rows: Sequence[Any]) -> list[np.ndarray]:
    """Where the tokens of rows that are padded on the right lie in the flattened batch."""
    width = max(map(len, rows))
    return [number * width + np.arange(len(row)) for number, row in enumerate(rows)]


@contextmanager
def embedding_noise(model: Any, batch: Batch, alpha: float) -> Iterator[None]:
    """While entered, the embeddings of a batch's tokens get uniform noise of at most alpha / sqrt(L D).

    L are the tokens of an example, D is the hidden size. NEFTune, Jain et al., 2023: https://arxiv.org/abs/2310.05914.
    """
    each = batch["lengths"][:, None, None]
    if "cu_seq_lens_q" in batch:
        lengths = batch["cu_seq_lens_q"].diff()
        each = lengths.repeat_interleave(lengths)[None, :, None]

    def add(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        reach = alpha / (each * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * reach.to(embedded)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
