"""All rows of a recipe as canonical rows, split into what is learnt and what is held out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmkit.data.filters import build_filters
from llmkit.data.gather import Gathered, Kept, Request, gather
from llmkit.data.sources import Rejected
from llmkit.data.split import held_out, position
from llmkit.errors import DataError, RecipeError
from llmkit.model.loading import load_config
from llmkit.model.location import locate
from llmkit.recipe.fields import Source
from llmkit.recipe.schema import Data, Recipe
from llmkit.recipe.values import is_share, share
from llmkit.run.directory import Run
from llmkit.stages.base import task_class
from llmkit.tasks.base import Encoded, Task

_ROWS_AT_ONCE = 1000


class RecipeRows:
    """All rows of a recipe, split; gathering shows progress and every guess."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        self.read = 0
        self.rejected: list[Rejected] = []
        self.filtered: list[Rejected] = []
        self.taken_by_filter: dict[str, int] = {}
        self.train: list[Kept] = []
        self.held_out: list[Kept] = []
        self.general: list[Kept] = []
        self.pretrain: list[Kept] = []
        self.pretrain_held_out: list[Kept] = []
        self.labels: tuple[str, ...] = ()
        self.formats: dict[str, str] = {}
        data, kind = recipe.data, task_class(recipe).kind
        self._run = run
        eval_uri = None if data.eval is None or is_share(data.eval) else data.eval
        if data.train is None and eval_uri is None and (recipe.pretrain is None or recipe.pretrain.data is None):
            raise RecipeError(
                "there is no data to preprocess", expected="`data.train`, the URI of rows", where="data.train"
            )
        if data.train is not None:
            self.train = self._gather("data.train", data.train, kind, data)
            self.labels = _labels(self.train)
        if eval_uri is not None:
            self.held_out = self._gather("data.eval", (Source(uri=eval_uri),), kind, data)
            self.labels = self.labels or _labels_of_model(recipe) or _labels(self.held_out)
            self._refuse_new_labels(self.held_out, "a held-out")
        elif data.train is not None:
            self.train, self.held_out = _split(self.train, data.eval)
        if data.replay is not None:
            self.train += self._replayed(data, data.replay, kind)
        if data.general is not None:
            self.general = self._gather("data.general", data.general, "text", Data())
        if recipe.pretrain is not None:
            sources = recipe.pretrain.data
            if sources is None and kind == "text":
                self.pretrain, self.pretrain_held_out = self.train, self.held_out
            elif sources is None:
                raise RecipeError(
                    "pretraining needs plain text", expected="`pretrain.data`, the URI of texts", where="pretrain.data"
                )
            else:
                rows = self._gather("pretrain.data", sources, "text", Data())
                self.pretrain, self.pretrain_held_out = _split(rows, data.eval if is_share(data.eval) else "2%")

    def _gather(self, key: str, sources: Sequence[Source], kind: str, data: Data) -> list[Kept]:
        requests = [Request(s.uri, s.weight, s.format or data.format, s.columns or data.columns) for s in sources]
        progress = self._run.reporter.progress(f"reading {key}", 0, "rows")
        try:
            gathered: Gathered = gather(requests, kind, build_filters(data.filters), progress.advance)
        finally:
            progress.close()
        for uri, chosen in gathered.formats.items():
            renamed = ", ".join(f"{name} = `{column}`" for name, column in chosen.columns.items() if name != column)
            shown = f"{chosen.name} ({renamed})" if renamed else chosen.name
            self.formats[uri] = f"{shown}, " + (f"told from {chosen.guessed}" if chosen.guessed else "as named")
            if chosen.guessed:
                self._run.guess(f"{key} format", shown, chosen.guessed)
        self.read += gathered.read
        self.rejected += gathered.rejected
        self.filtered += gathered.filtered
        for name, count in gathered.taken_by_filter.items():
            self.taken_by_filter[name] = self.taken_by_filter.get(name, 0) + count
        if not gathered.rows:
            first = (gathered.rejected or gathered.filtered)[0]
            raise DataError(
                f"no row of `{key}` can be used",
                got=f"{gathered.read} rows; the first: {first.reason}",
                where=first.where,
                hint="`llmkit inspect` shows how rows are understood",
            )
        return gathered.rows

    def _replayed(self, data: Data, sources: Sequence[Source], kind: str) -> list[Kept]:
        """Rows of other data, weighed so that they make up their share of the training rows; none that is held out."""
        held_out_rows = {position(kept.row) for kept in self.held_out}
        rows = [
            row for row in self._gather("data.replay", sources, kind, data) if position(row.row) not in held_out_rows
        ]
        part = share(data.replay_share)
        weight = (
            sum(kept.weight for kept in self.train) * part / (1 - part) / max(sum(kept.weight for kept in rows), 1e-9)
        )
        self._run.reporter.note(
            f"replayed: {data.replay_share} of the training rows, each of {len(rows)} {weight:.2f} times"
        )
        replayed = [replace(kept, weight=kept.weight * weight) for kept in rows]
        self._refuse_new_labels(replayed, "a replayed")
        return replayed

    def _refuse_new_labels(self, rows: Sequence[Kept], which: str) -> None:
        for kept in rows:
            if "label" in kept.row and kept.row["label"] not in self.labels:
                raise DataError(
                    f"{which} row has a label that the training data has not",
                    got=kept.row["label"],
                    expected="one of " + ", ".join(self.labels),
                    where=kept.where,
                    hint="take the row out, or add rows with this label to data.train",
                )


def encode_rows(task: Task, rows: Sequence[Kept]) -> Iterator[tuple[Kept, Encoded | str]]:
    """Each row with its examples, or the reason why it has none; a thousand at a time, with all cores."""
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE]
        yield from zip(part, task.encode([kept.row for kept in part]), strict=True)


def _labels(rows: Sequence[Kept]) -> tuple[str, ...]:
    """All labels, in the order of their numbers when they are numbers, else of their letters."""
    found = {kept.row["label"] for kept in rows if "label" in kept.row}
    numeric = all(label.lstrip("-").isdigit() for label in found)
    return tuple(sorted(found, key=int if numeric else None))


def _labels_of_model(recipe: Recipe) -> tuple[str, ...]:
    """The labels that a model was trained on, when it is scored without training data."""
    if not task_class(recipe).shaped_by_data or recipe.model is None:
        return ()
    config = load_config(locate(recipe.model))
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return ()
    return tuple(config.id2label[number] for number in sorted(config.id2label))


def _split(rows: list[Kept], fraction: str | None) -> tuple[list[Kept], list[Kept]]:
    """Training and held-out rows, by what the rows say."""
    if fraction is None:
        return rows, []
    out = held_out([position(kept.row) for kept in rows], share(fraction))
    return [k for k, o in zip(rows, out, strict=True) if not o], [k for k, o in zip(rows, out, strict=True) if o]
