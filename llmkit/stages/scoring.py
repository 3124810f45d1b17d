"""What a model says of data sets: from what is kept, and by loading the model once for all that is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.errors import ArtifactError
from llmkit.files import digest_json
from llmkit.metrics.statistic import Predictions
from llmkit.model.loading import load_config, load_model
from llmkit.model.precision import compute_in
from llmkit.run.directory import Run
from llmkit.stages.origins import Origins, origins_of
from llmkit.stages.predictions import VERSION, KeptScores
from llmkit.tasks.base import Known, Scoring, Task
from llmkit.tasks.scoring import NotFiniteError, ScoreTable, fill, predictions_of
from llmkit.train.state import seed_everything


@dataclass(frozen=True)
class DataSet:
    """Some examples of a corpus, by ascending numbers, and the task that reads them; `title` is for people."""

    name: str
    title: str
    task: Task
    corpus: Corpus
    numbers: np.ndarray
    scoring: Scoring
    together: np.ndarray | None = None  # of each example of the corpus a number of the group that it is drawn with
    part: tuple[int, int] = (0, 1)  # of what is to be answered, which process's share of how many

    def share(self, process: int, processes: int) -> DataSet:
        """What one of some processes is to score of it."""
        return replace(self, numbers=self.numbers[process::processes], part=(process, processes))

    def to_answer(self) -> np.ndarray:
        """The examples to which the model is to write an answer."""
        process, processes = self.part
        return self.task.to_answer(self.corpus, self.scoring)[process::processes]

    @property
    def origins(self) -> Origins | None:
        """Where the examples of the corpus come from."""
        return origins_of(self.corpus)

    def groups(self) -> np.ndarray:
        """Of each example of the corpus a number; windows of one document have the same, and so have rows of one group."""
        if self.together is not None:
            return self.together
        origins = self.origins
        return np.arange(len(self.corpus)) if origins is None else origins.groups()


@dataclass
class ScoredModel:
    """One model that is scored on data sets; it is loaded when something is missing, and then kept."""

    run: Run
    name: str
    folder: Path
    content: str  # the digest of its weights
    seed: int
    keep: bool
    known: Callable[[Any, DataSet, Scoring], Known | None]
    kept: set[Path] = field(default_factory=set)  # folders of the cache that were used
    untrained: tuple[str, ...] = ()  # its parameters that nothing was ever learnt in
    _loaded: Any = None
    _new: tuple[str, ...] = ()

    def predictions(self, data: DataSet) -> Predictions:
        """What the model says of a data set. Raises ArtifactError when that is not finite."""
        table = self._filled(data)
        answered = data.to_answer()
        return predictions_of(data.task, data.corpus, table, data.numbers, answered, data.groups(), self.seed)

    def keep_scores(self, data: DataSet) -> None:
        """Only keeps what the model says, for `predictions` to find. Raises ArtifactError when that is not finite."""
        self._filled(data)

    def release(self) -> None:
        """Lets go of the model's weights."""
        self._loaded = None

    def _filled(self, data: DataSet) -> ScoreTable:
        table = self._table(data)
        try:
            self._fill(table, data)
        finally:
            if isinstance(table, KeptScores):
                table.close()
        if table.untrained and not self.untrained:
            new = ", ".join(table.untrained)
            self.run.reporter.warn(f"the {self.name} has no trained {new}: its scores are those of chance")
            self.untrained = table.untrained
        return table

    def _table(self, data: DataSet) -> ScoreTable:
        if not self.keep:
            return ScoreTable(len(data.corpus))
        key, answers = self._keys(data)
        table = KeptScores(len(data.corpus), key, answers, self.run.reporter)
        self.kept.add(table.folder)
        return table

    def _keys(self, data: DataSet) -> tuple[str, str]:
        """The digests of all that decides the scores, and the answers beside them."""
        import torch
        import transformers

        task, scoring = data.task, data.scoring
        new_head = self.seed if task.model_changes(load_config(self.folder)) else None
        key = digest_json(
            [
                [VERSION, torch.__version__, transformers.__version__],
                [scoring.precision, scoring.device.type, type(task).__name__, new_head],
                [self.content, data.corpus.content, task.describe()],
            ]
        )
        return key, digest_json([scoring.max_new_tokens, task.stops(data.corpus, scoring)])

    def _fill(self, table: ScoreTable, data: DataSet) -> None:
        task, corpus, scoring = data.task, data.corpus, data.scoring
        missing = len(table.not_scored(data.numbers))
        unanswered = len(table.not_answered(data.to_answer()))
        if not missing + unanswered:
            self.run.reporter.note(f"the scores of the {self.name} on {data.title} are there from before")
            return
        if missing < len(data.numbers):
            done = len(data.numbers) - missing
            self.run.reporter.note(
                f"the scores of the {self.name} on {done:,} examples of {data.title} are there already"
            )
        model = self._model(task, scoring)
        if self._new and not table.untrained:
            table.add_untrained(self._new)
        scoring = replace(scoring, objective=task.objective(model))
        known = self.known(model, data, scoring) if missing and data.part == (0, 1) else None
        title = f"scoring the {self.name} on {data.title}"
        progress = self.run.reporter.progress(title, missing + unanswered, "examples")
        try:
            scoring = replace(scoring, advance=progress.advance, known=known)
            fill(table, task, model, corpus, data.numbers, scoring, data.to_answer())
        except NotFiniteError as error:
            raise ArtifactError(
                f"the {self.name}'s scores are not finite numbers",
                got=f"{error.got} of {data.title}",
                expected=error.expected,
                hint=error.hint,
                where=self.folder,
            ) from None
        finally:
            progress.close()

    def _model(self, task: Task, scoring: Scoring) -> Any:
        """A new head (a parent that never saw these labels) is seeded."""
        if self._loaded is None:
            seed_everything(self.seed)
            loaded = load_model(self.folder, task.auto_class, **task.model_changes(load_config(self.folder)))
            self._new = loaded.new_parameters
            compute_in(loaded.model, scoring.precision)  # before it comes to a device that may have no room for more
            self._loaded = loaded.model.to(scoring.device).eval()
        return self._loaded
