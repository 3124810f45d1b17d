"""What the model will see of a recipe's data, without writing anything."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.data.sources import Rejected, Where
from llmkit.model.loading import load_tokenizer
from llmkit.recipe.schema import Recipe
from llmkit.run.directory import Run
from llmkit.stages.base import task_class
from llmkit.stages.encoding import encode_rows
from llmkit.stages.preprocess import settings_for, tokenizer_for
from llmkit.stages.rows import RecipeRows
from llmkit.stages.statistics import filter_statistics
from llmkit.tasks.base import Encoded


@dataclass(frozen=True)
class ShownExample:
    """One example, token by token; `supervised` is None for tasks that do not learn tokens, which have a `label`."""

    where: str
    tokens: list[str]
    ids: list[int]
    supervised: list[bool] | None
    label: str | None


@dataclass(frozen=True)
class Inspection:
    """How the rows of a recipe were understood, and what became of them."""

    task: str
    formats: dict[str, str]
    facts: dict[str, Any]
    counts: dict[str, int]
    percentiles: dict[str, list[int]]
    filters: dict[str, Any]
    unusable: list[Rejected]
    examples: list[ShownExample]


PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


def inspect_data(recipe: Recipe, run: Run, examples: int) -> Inspection:
    """Reads, renders and tokenises all rows of `data.train` and `data.eval`; `run` is only told of progress."""
    with tempfile.TemporaryDirectory(prefix="llmkit-") as folder:
        return _inspect(recipe, RecipeRows(recipe, run, Path(folder)), examples)


def shown_examples(run: Path, count: int) -> list[ShownExample]:
    """Examples out of the corpora that a run has made, evenly spaced over the first of them."""
    name = next(name for name in ("train", "pretrain", "eval") if (run / "preprocess" / name / "corpus.json").exists())
    corpus = Corpus(run / "preprocess" / name)
    tokenizer = load_tokenizer(run / "preprocess" / "tokenizer")
    numbers = np.unique(np.linspace(0, len(corpus) - 1, min(count, len(corpus))).astype(int))
    labels = tuple(corpus.meta["settings"]["labels"])
    return [_shown(tokenizer, corpus[int(n)], f"{name}, example {n}", labels) for n in numbers]


def _inspect(recipe: Recipe, rows: RecipeRows, examples: int) -> Inspection:
    tokenizer = tokenizer_for(recipe, rows)
    task = task_class(recipe)(tokenizer, settings_for(recipe, rows))
    kept = rows.train + rows.held_out
    kept = kept if len(kept) else rows.pretrain + rows.pretrain_held_out
    unusable, lengths, supervised, cut, lost = _unusable(rows), [], [], 0, 0
    shown: list[ShownExample] = []
    step = max(1, len(kept) // max(examples, 1))
    encoded_rows = (pair for part in kept.parts for pair in encode_rows(task, part))
    for number, (row, encoded) in enumerate(encoded_rows):
        if not isinstance(encoded, Encoded):
            unusable.append(Rejected(encoded, row.where))
            continue
        cut += encoded.lost_tokens > 0
        lost += encoded.lost_tokens
        for example in encoded.examples:
            lengths.append(len(example[task.size_column]))
            supervised.append(int(np.sum(example.get("supervised", 0))))
        if number % step == 0 and len(shown) < examples:
            shown.append(_shown(tokenizer, encoded.examples[0], str(row.where), rows.labels))
    counts = {
        "rows read": rows.read,
        "rows to train on": len(rows.train),
        "rows held out": len(rows.held_out),
        "rows taken out by filters": sum(sum(reasons.values()) for reasons in rows.filtered.values()),
        "rows that cannot be used": len(unusable),
        "rows that would be cut": cut,
        "tokens that would be cut off": lost,
        "examples": len(lengths),
        "tokens": int(np.sum(lengths)),
    }
    percentiles = {"tokens": _percentiles(lengths)}
    if any(supervised):
        counts["supervised tokens"] = int(np.sum(supervised))
        percentiles["supervised tokens"] = _percentiles(supervised)
    facts = {key: value for key, value in task.describe().items() if value is not None}
    return Inspection(recipe.task, rows.formats, facts, counts, percentiles, filter_statistics(rows), unusable, shown)


def _unusable(rows: RecipeRows) -> list[Rejected]:
    """The rows that could not be read or converted; those that filters took out are not among them."""
    lines = (json.loads(line) for path in rows.left_out for line in path.open(encoding="utf-8"))
    return [
        Rejected(line["reason"], Where(line["source"], line["line"]))
        for line in lines
        if not line["reason"].startswith("filter ")
    ]


def _shown(tokenizer: Any, example: dict[str, Any], where: str, labels: tuple[str, ...]) -> ShownExample:
    ids = [int(i) for i in example["input_ids"]]
    marks = example.get("supervised")
    supervised = None if marks is None else [bool(mark) for mark in marks]
    label = labels[example["label"]] if "label" in example else None
    return ShownExample(where, _token_texts(tokenizer, ids), ids, supervised, label)


def _token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds; a character of several tokens is shown with the last of them."""
    texts, before = [], ""
    for end in range(1, len(ids) + 1):
        start = max(0, end - 8)  # decoding a short window keeps this linear; 8 tokens hold any UTF-8 character
        before = tokenizer.decode(ids[start : end - 1], clean_up_tokenization_spaces=False) if end > 1 else ""
        through = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        stable = before.rstrip("\ufffd")
        texts.append("" if through.endswith("\ufffd") else through[len(stable) :])
    return texts


def _percentiles(values: list[int]) -> list[int]:
    return [int(np.percentile(values, p)) for p in PERCENTILES] if values else []
