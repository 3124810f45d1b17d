"""From what a model says of examples to its scores: every metric is a pure function of the predictions.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmkit import catalog
from llmkit.data.corpus import Corpus
from llmkit.data.own_code import OwnCode
from llmkit.errors import ArtifactError, DataError
from llmkit.metrics.own import own_metric
from llmkit.metrics.statistic import Metric, NoValueError, Predictions, Statistic, value_of
from llmkit.tasks.base import Fields, Scores, Scoring, Task


class NotFiniteError(ArtifactError):
    """What a model made of examples is not finite."""


class ScoreTable:
    """What is known of the examples of a corpus: fields, (N, ...), and answers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.fields: Fields = {}
        self.answers: dict[int, str] = {}
        self.untrained: tuple[str, ...] = ()  # the model's parameters that nothing was ever learnt in: a new head
        self._scored = np.zeros(count, bool)

    def add(self, numbers: list[int], fields: Fields) -> None:
        """Takes in what a model made of some examples. Raises NotFiniteError."""
        wrong = [name for name, values in fields.items() if not np.isfinite(values).all()]
        if wrong:
            raise NotFiniteError(
                "the model's scores are not finite numbers",
                got=f"the {', '.join(wrong)} of examples",
                expected="finite weights and a loss",
                hint="its training diverged, or its files are damaged; evaluate.precision: fp32 rules out the precision",
            )
        for name, values in fields.items():
            if name not in self.fields:
                self.fields[name] = np.zeros((self.count, *values.shape[1:]), values.dtype)
            self.fields[name][numbers] = values
        self._scored[numbers] = True

    def add_untrained(self, parameters: tuple[str, ...]) -> None:
        """Takes in which of the model's parameters nothing was ever learnt in."""
        self.untrained = parameters

    def add_answers(self, numbers: list[int], answers: list[str]) -> None:
        """Takes in what a model wrote."""
        self.answers |= dict(zip(numbers, answers, strict=True))

    def not_scored(self, numbers: np.ndarray) -> np.ndarray:
        """Which of some examples nothing is known of."""
        return numbers[~self._scored[numbers]]

    def not_answered(self, numbers: np.ndarray) -> np.ndarray:
        """Which of some examples have no answer."""
        return np.array([number for number in numbers.tolist() if number not in self.answers], np.int64)


def fill(
    table: ScoreTable,
    task: Task,
    model: Any,
    corpus: Corpus,
    numbers: np.ndarray,
    scoring: Scoring,
    to_answer: np.ndarray,
) -> None:
    """Has the model say what is missing of some examples, and of those that are to be answered."""
    missing = table.not_scored(numbers)
    if len(missing):
        for part, fields in task.predict(model, corpus, missing, scoring):
            table.add(part, fields)
    unanswered = table.not_answered(to_answer)
    if len(unanswered):
        for part, answers in task.answer(model, corpus, unanswered, scoring):
            table.add_answers(part, answers)


def predictions_of(
    task: Task,
    corpus: Corpus,
    table: ScoreTable,
    numbers: np.ndarray,
    answered: np.ndarray,
    groups: np.ndarray,
    seed: int,
) -> Predictions:
    """What metrics need of some examples, by ascending numbers; `groups` are those of the whole corpus, (N,).

    Of the answers that are known, those to the examples that are to be `answered` count, and no others.
    """
    fields = {name: values[numbers] for name, values in table.fields.items()}
    chosen = set(numbers.tolist()) & set(answered.tolist())
    answers = {number: text for number, text in table.answers.items() if number in chosen}
    found = task.predictions(corpus, numbers, fields, answers)
    return Predictions(found, groups[numbers], task.settings.labels, seed)


def metric_named(name: str) -> Metric:
    """A metric of the catalogue, or the user's own, `path.py:function`. Raises RecipeError."""
    if catalog.is_own_code(name):
        function = OwnCode("metric", name, "evaluate.metrics")
        function.require_inputs(2, "evaluate.metrics")
        return own_metric(function)
    found: Metric = catalog.resolve("metric", name, where="evaluate.metrics")
    return found


def metric_key(name: str) -> str:
    """How a metric is called in results: the user's own without the folder of its file."""
    return Path(name).name if catalog.is_own_code(name) else name


def statistics_of(
    names: Iterable[str], predictions: Predictions, *, part: bool = False
) -> tuple[dict[str, Statistic], dict[str, float], dict[str, str]]:
    """The metrics of some predictions: what they are made of, their values, and why others have none.

    A metric of the user's own may fail on a `part` of the examples, where it then has no value.
    """
    statistics: dict[str, Statistic] = {}
    values: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name in names:
        key = metric_key(name)
        try:
            statistic = metric_named(name)(predictions)
            values[key] = value_of(statistic)
            statistics[key] = statistic
        except NoValueError as error:
            reasons[key] = str(error)
        except DataError as error:
            if not part:
                raise
            reasons[key] = f"{error.what}: {error.got}"
    return statistics, values, reasons


def evaluate(
    task: Task,
    model: Any,
    corpus: Corpus,
    scoring: Scoring,
    part: tuple[int, int] = (0, 1),
    gather: Callable[[list[Any]], list[Any]] = list,
) -> Scores:
    """A model's scores on a whole corpus; nothing is kept.

    With `part`, this is one of so many processes, each of which scores its share; `gather` joins what all of them list.
    """
    everything, answered = np.arange(len(corpus)), task.to_answer(corpus, scoring)
    own, to_answer = everything[part[0] :: part[1]], answered[part[0] :: part[1]]
    mine, table = ScoreTable(len(corpus)), ScoreTable(len(corpus))
    fill(mine, task, model, corpus, own, scoring, to_answer)
    for numbers, fields, answers in gather([(own, {n: v[own] for n, v in mine.fields.items()}, mine.answers)]):
        table.add(numbers, fields)
        table.answers |= answers
    predictions = predictions_of(task, corpus, table, everything, answered, everything, seed=0)
    _, values, reasons = statistics_of(scoring.metrics, predictions)
    samples = samples_of(task, corpus, {"answer": predictions}, everything, scoring.samples)
    return Scores(values, task.tables(predictions), samples, reasons)


def samples_of(
    task: Task, corpus: Corpus, predictions: Mapping[str, Predictions], numbers: np.ndarray, count: int
) -> list[dict[str, str]]:
    """Some examples for people, with what each model said; `numbers` are those of the predictions."""
    first = next(iter(predictions.values()))
    return [
        task.shown(corpus, int(numbers[place]))
        | {name: _as_text(each["answer"][place]) for name, each in predictions.items()}
        for place in task.samples(first.fields, count).tolist()
    ]


def _as_text(said: Any) -> str:
    return said if isinstance(said, str) else f"{said:.4g}"


def evenly(count: int, of: int) -> np.ndarray:
    """So many numbers below `of`, evenly spaced."""
    return np.unique(np.linspace(0, of - 1, min(count, of)).astype(int)) if of else np.zeros(0, np.int64)
