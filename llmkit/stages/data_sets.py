"""More data for evaluate: encoded as the held-out rows of the recipe are, and a sample of what was learnt from."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.data.gather import Gathered, gather
from llmkit.errors import DataError, RecipeError
from llmkit.recipe.fields import Source
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import count_of
from llmkit.run.directory import Run
from llmkit.stages.base import corpus_in, upstream_models
from llmkit.stages.encoding import Encoding, Examples, Wanted, encode_all, joined
from llmkit.stages.rows import requests_of, workers_of
from llmkit.tasks.base import Task

MOST_OF_TRAIN = 500  # examples, unless a number is asked for


def data_set_folder(run: Run, name: str) -> Path:
    """Where the corpus of a data set lies."""
    return run.folder("evaluate") / "data" / name


def data_set(recipe: Recipe, run: Run, task: Task, name: str, like: Corpus) -> Corpus:
    """A corpus of the rows behind `evaluate.data_sets`, made as `like` was. Raises DataError for rows it cannot score."""
    folder = data_set_folder(run, name)
    work = folder.with_name(f".{name}.work")
    shutil.rmtree(work, ignore_errors=True)
    data, progress = recipe.data, run.reporter.progress(f"reading {name}", 0, "rows")
    requests = requests_of(data, (Source(uri=recipe.evaluate.data_sets[name]),))
    try:
        gathered = gather(
            *(requests, task.kind, data.filters, work / "rows"), workers=workers_of(data), advance=progress.advance
        )
    finally:
        progress.close()
    _refuse_new_labels(gathered, task, name)
    how = Encoding(recipe.task, run.folder("preprocess") / "tokenizer", task.settings)
    wanted = [Wanted(name, gathered.rows, how, task)]
    parts, sources = encode_all(run, wanted, work / "examples", workers_of(data))
    examples = Examples(task, parts[name], sources[name])
    _refuse_too_few(recipe, name, gathered, examples)
    made = joined(folder, examples, like.meta["identity"].get("tokenizer"))
    left_out = gathered.read - made.meta["rows"]
    if left_out:
        run.reporter.note(f"{name}: {left_out:,} of {gathered.read:,} rows are left out, by filters or as unusable")
    shutil.rmtree(work, ignore_errors=True)
    return made


def train_sample(recipe: Recipe, run: Run, held_out: str, examples: int) -> tuple[Corpus, np.ndarray] | None:
    """Training examples to hold the held-out ones against, by ascending numbers; None where there are none to be had."""
    asked = recipe.evaluate.train_sample
    corpus = corpus_in(run, "pretrain" if held_out == "pretrain-eval" else "train")
    if corpus is None or not len(corpus) or not upstream_models(recipe, "evaluate"):
        if isinstance(asked, int) and asked:
            raise RecipeError(
                "there are no training examples to score",
                got=f"evaluate.train_sample: {asked}",
                expected="a recipe that trains the model that it scores",
                where="evaluate.train_sample",
            )
        return None
    count = min(len(corpus), asked if isinstance(asked, int) else min(examples, MOST_OF_TRAIN))
    if not count:
        return None
    chosen = np.random.default_rng([recipe.seed, 4]).choice(len(corpus), count, replace=False)
    return corpus, np.sort(chosen)


def _refuse_new_labels(gathered: Gathered, task: Task, name: str) -> None:
    labels = task.settings.labels
    for label, place in gathered.labels.items():
        if labels and label not in labels:
            raise DataError(
                f"a row of the data set `{name}` has a label that the model has not",
                got=label,
                expected="one of " + ", ".join(labels),
                hint="take the row out, or name other data under evaluate.data_sets",
                where=place,
            )


def _refuse_too_few(recipe: Recipe, name: str, gathered: Gathered, examples: Examples) -> None:
    """Raises DataError when more rows are unusable than `data.max_rejected` allows, or none is left."""
    unusable = Counter({reason: count for reason, (count, _) in gathered.rejected.items()})
    for part in examples.parts:
        unusable.update({reason: count for reason, (count, _) in part.meta["rejected"].items()})
    allowed = count_of(recipe.data.max_rejected, gathered.read)
    if sum(unusable.values()) > allowed or not any(map(len, examples.parts)):
        shown = "; ".join(f"{count} x {reason}" for reason, count in unusable.most_common(3))
        raise DataError(
            f"{sum(unusable.values())} of {gathered.read} rows of the data set `{name}` cannot be used",
            got=shown,
            expected=f"at most {allowed} (data.max_rejected: {recipe.data.max_rejected})",
            hint="mend them, or raise data.max_rejected",
            where=f"evaluate.data_sets.{name}",
        )
