"""All rows of a recipe as canonical rows on disk, split into what is learnt and what is held out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmkit.data.gather import Gathered, Request, RowSet, gather
from llmkit.data.shards import Tally
from llmkit.data.split import Share, held_out
from llmkit.data.stream import Stream
from llmkit.data.workers import cores
from llmkit.errors import DataError, RecipeError
from llmkit.model.loading import load_config
from llmkit.model.location import locate
from llmkit.recipe.fields import Source
from llmkit.recipe.schema import Data, Recipe
from llmkit.recipe.values import is_share, share
from llmkit.run.directory import Run
from llmkit.stages.base import task_class

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,300}")


class RecipeRows(Tally):
    """All rows of a recipe, split, in a folder; gathering shows progress and every guess."""

    def __init__(self, recipe: Recipe, run: Run, folder: Path) -> None:
        super().__init__()
        self.train = self.held_out = self.general = self.pretrain = self.pretrain_held_out = RowSet()
        self.labels: tuple[str, ...] = ()
        self.formats: dict[str, str] = {}
        self.repeated_held_out = 0  # training rows left out because they are held out too
        data, kind = recipe.data, task_class(recipe).kind
        self._run, self._folder, self._data = run, folder, data
        self._workers = workers_of(data)
        eval_uri = data.eval if data.eval_is_uri else None
        if data.train is None and eval_uri is None and (recipe.pretrain is None or recipe.pretrain.data is None):
            raise RecipeError(
                "there is no data to preprocess", expected="`data.train`, the URI of rows", where="data.train"
            )
        if data.train is not None and data.stream:
            self.train = self._first_block(data.train, kind, data)
        elif data.train is not None:
            learnt = self._gather("data.train", data.train, kind, data)
            self.train, self.labels = learnt.rows, _sorted_labels(learnt.labels)
            _refuse_unknown_column(data, learnt)
        if eval_uri is not None:
            asked = self._gather("data.eval", (Source(uri=eval_uri),), kind, data)
            self.held_out = asked.rows
            self.labels = self.labels or _labels_of_model(recipe) or _sorted_labels(asked.labels)
            self._refuse_new_labels(asked, "a held-out")
            self._leave_out_held_out()
        elif data.train is not None and not data.stream:
            self.train, self.held_out = _split(self.train, data)
        if data.train_share is not None and len(self.train):
            self.train = _part(self.train, data)
        if data.replay is not None:
            self.train += self._replayed(data, data.replay, kind)
        if data.general is not None:
            self.general = self._gather("data.general", data.general, "text", Data()).rows
        if recipe.pretrain is not None:
            sources = recipe.pretrain.data
            if sources is None and kind == "text":
                self.pretrain, self.pretrain_held_out = self.train, self.held_out
            elif sources is None:
                raise RecipeError(
                    "pretraining needs plain text", expected="`pretrain.data`, the URI of texts", where="pretrain.data"
                )
            else:
                rows = self._gather("pretrain.data", sources, "text", Data()).rows
                part = data.eval if is_share(data.eval) else "2%"
                self.pretrain, self.pretrain_held_out = _split(rows, Data(eval=part))

    def _gather(self, key: str, sources: Sequence[Source], kind: str, data: Data) -> Gathered:
        requests = requests_of(data, sources)
        seen = requests_of(data, data.seen or ()) if key == "data.train" else ()
        progress = self._run.reporter.progress(f"reading {key}", 0, "rows")
        try:
            gathered = gather(
                *(requests, kind, data.filters, self._folder / key),
                seen=seen,
                group=data.group,
                stratify=data.stratify,
                workers=self._workers,
                advance=progress.advance,
            )
        finally:
            progress.close()
        self._tell_formats(key, gathered)
        self.add(gathered)
        if not len(gathered.rows):
            reasons = [(reason, where) for reason, (_, where) in gathered.rejected.items()]
            reasons += [
                (f"filter {n}: {s['reason']}", s["where"]) for n, some in gathered.samples.items() for s in some
            ]
            reasons += [(f"filter {name}: {next(iter(found))}", key) for name, found in gathered.filtered.items()]
            raise DataError(
                f"no row of `{key}` can be used",
                got=f"{gathered.read} rows; the first: {reasons[0][0]}",
                where=reasons[0][1],
                hint="`llmkit inspect` shows how rows are understood",
            )
        return gathered

    def filter_names(self) -> list[str]:
        """The filters that took out or changed something, in the recipe's order."""
        named = [spec if isinstance(spec, str) else next(iter(spec)) for spec in self._data.filters]
        return [name for name in dict.fromkeys(named) if name in self.filtered or name in self.changed]

    def _tell_formats(self, key: str, gathered: Gathered) -> None:
        for uri, chosen in gathered.formats.items():
            renamed = ", ".join(f"{name} = `{column}`" for name, column in chosen.columns.items() if name != column)
            shown = f"{chosen.name} ({renamed})" if renamed else chosen.name
            self.formats[uri] = f"{shown}, " + (f"told from {chosen.guessed}" if chosen.guessed else "as named")
            if chosen.guessed:
                self._run.guess(f"{key} format", shown, chosen.guessed)

    def _first_block(self, sources: Sequence[Source], kind: str, data: Data) -> RowSet:
        """The rows that a stream begins with: what is told of the data beforehand is told of these."""
        stream = stream_of(data, sources, kind)
        gathered, _ = stream.block(stream.start, self._folder / "data.train")
        self._tell_formats("data.train", gathered)
        self.add(gathered)
        self._run.reporter.note(f"data.train is a stream: the corpus `train` is its first block, {gathered.read} rows")
        return gathered.rows

    def _leave_out_held_out(self) -> None:
        """Training rows that say what a held-out row says are not learnt from."""
        if self._data.leaks in ("off", "report") or not len(self.train):
            return
        repeated = np.isin(self.train.column("position"), self.held_out.column("position"))
        if repeated.all():
            raise DataError(
                "all training rows are held out too",
                got=f"{len(self.train)} rows of data.train, each of which stands in data.eval",
                hint="name other data under data.eval, or a share such as 5%; data.leaks: report learns them all the same",
                where="data.eval",
            )
        self.repeated_held_out = int(repeated.sum())
        self.train = self.train.where(~repeated)

    def _replayed(self, data: Data, sources: Sequence[Source], kind: str) -> RowSet:
        """Rows of other data, weighed so that they make up their share of the training rows; none that is held out."""
        gathered = self._gather("data.replay", sources, kind, data)
        self._refuse_new_labels(gathered, "a replayed")
        repeated = np.isin(gathered.rows.column("position"), self.held_out.column("position"))
        rows = gathered.rows.where(~repeated)
        part = share(data.replay_share)
        weight = self.train.total_weight * part / (1 - part) / max(rows.total_weight, 1e-9)
        self._run.reporter.note(
            f"replayed: {data.replay_share} of the training rows, each of {len(rows)} {weight:.2f} times"
        )
        return rows.weighed(weight)

    def _refuse_new_labels(self, gathered: Gathered, which: str) -> None:
        for label, where in gathered.labels.items():
            if label not in self.labels:
                learnt = self._data.train is not None
                raise DataError(
                    f"{which} row has a label that the {'training data' if learnt else 'model'} has not",
                    got=label,
                    expected="one of " + ", ".join(self.labels),
                    where=where,
                    hint="take the row out, or add rows with this label to data.train"
                    if learnt
                    else "take the row out, or name the labels in the order of their numbers (id2label) in config.json",
                )


def requests_of(data: Data, sources: Sequence[Source]) -> list[Request]:
    """What the recipe says of sources."""
    return [Request(s.uri, s.weight, s.format or data.format, s.columns or data.columns) for s in sources]


def stream_of(data: Data, sources: Sequence[Source], kind: str) -> Stream:
    """The training rows as a stream."""
    return Stream(requests_of(data, sources), kind, data.filters)


def workers_of(data: Data) -> int:
    """How many processes work on the rows."""
    return cores() if data.workers == "auto" else data.workers


def _sorted_labels(found: Sequence[str] | dict[str, str]) -> tuple[str, ...]:
    """All labels, in the order of their numbers when they are numbers, else of their letters."""
    numeric = all(_WHOLE_NUMBER.fullmatch(label) for label in found)
    return tuple(sorted(found, key=int if numeric else None))


def _labels_of_model(recipe: Recipe) -> tuple[str, ...]:
    """The labels that a model was trained on, when it is scored without training data."""
    if not task_class(recipe).shaped_by_data or recipe.model is None:
        return ()
    config = load_config(locate(recipe.model))
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return ()
    return tuple(config.id2label[number] for number in sorted(config.id2label))


def _refuse_unknown_column(data: Data, learnt: Gathered) -> None:
    for key, column in (("group", data.group), ("stratify", data.stratify)):
        if column is not None and not learnt.with_column:
            raise DataError(
                f"no row has the column `{column}`",
                got=f"data.{key}: {column}",
                expected="a column of the data",
                hint="`llmkit inspect` shows the columns",
                where=f"data.{key}",
            )


def _part(rows: RowSet, data: Data) -> RowSet:
    """The share of the training rows that is learnt from: the same rows as in every larger share."""
    strata = rows.column("stratum") if data.stratify is not None else None
    wanted = Share(count=max(1, round(share(str(data.train_share)) * len(rows))))
    return rows.where(held_out(rows.column("place"), wanted, strata))


def _split(rows: RowSet, data: Data) -> tuple[RowSet, RowSet]:
    """Training and held-out rows, by what the rows say."""
    if data.eval is None:
        return rows, RowSet()
    positions = rows.column("place")
    if data.fold is not None:
        number, folds = map(int, data.fold.split("/"))
        if len(np.unique(positions)) < folds:
            raise DataError(
                "there are fewer rows than folds",
                got=f"{len(np.unique(positions))} different ones",
                expected=f"at least {folds}",
                where="data.fold",
            )
        wanted = Share(fold=(number, folds))
    else:
        wanted = Share(share(data.eval)) if is_share(data.eval) else Share(count=int(data.eval))
        if wanted.count >= len(rows):
            raise DataError(
                "there are no more rows than are to be held out",
                got=f"{len(rows)} rows, data.eval: {data.eval}",
                expected=f"at most {len(rows) - 1}, so that some are left to learn from",
                where="data.eval",
            )
    out = held_out(positions, wanted, rows.column("stratum") if data.stratify is not None else None)
    return rows.where(~out), rows.where(out)
