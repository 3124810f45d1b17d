"""What evaluate leaves: results.json, and predictions*.jsonl with what each model said of each example."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.data.corpus import Corpus
from llmkit.metrics.statistic import Predictions
from llmkit.stages.comparison import Comparing, Comparison, gaps
from llmkit.stages.scoring import DataSet
from llmkit.stages.slices import parts_of
from llmkit.tasks.scoring import samples_of

HELD_OUT = "held_out"


def results_of(data: DataSet, found: Comparison, predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    """The main part of results.json."""
    tables = {who: data.task.tables(each) for who, each in predictions.items()}
    return {
        **found.values,
        "models": list(found.values),
        "examples": found.examples,
        "tables": {who: table for who, table in tables.items() if table},
        "samples": samples_of(data.task, data.corpus, predictions, data.numbers, data.scoring.samples),
        "intervals": found.intervals,
        "differences": found.differences,
        "reasons": found.reasons,
        "scored": found.scored,
    }


def scored_slices(
    slices: Mapping[str, list[str]], predictions: Mapping[str, Predictions], compare: Comparing
) -> list[dict[str, Any]]:
    """The scores of each part of the held-out data."""
    found, compare = [], replace(compare, part=True)
    for by, values in slices.items():
        for value, places in parts_of(values):
            part = {who: each.take(places) for who, each in predictions.items()}
            found.append({"by": by, "value": value} | compare(part, f"{by}={value}").json())
    return found


def add_general(results: dict[str, Any], general: Comparison | None) -> None:
    """Scores on general text stand beside the others, as `general_METRIC`."""
    if general is None:
        return
    parts = {"intervals": general.intervals, "differences": general.differences, "reasons": general.reasons}
    for who, values in general.values.items():
        results[who] |= {f"general_{metric}": value for metric, value in values.items()}
    for part, by_model in parts.items():
        for who, found in by_model.items():
            mine = results[part].setdefault(who, {})
            mine |= {f"general_{metric}": value for metric, value in found.items()}


def all_gaps(comparisons: Mapping[str, Comparison]) -> list[dict[str, Any]]:
    """From what was learnt to what is held out, and from there to each further data set."""
    found = gaps(comparisons, "train", HELD_OUT, "over-fitting") if "train" in comparisons else []
    for name in comparisons:
        if name not in (HELD_OUT, "train"):
            found += gaps(comparisons, HELD_OUT, name, "domain")
    return found


def write_predictions(path: Path, data: DataSet, predictions: Mapping[str, Predictions]) -> None:
    """A line for each example: where it comes from, what it says, and what each model said of it."""
    aside, origins = path.with_name(f".{path.name}.tmp"), data.origins
    lengths = data.corpus.lengths(data.task.size_column)
    with aside.open("w", encoding="utf-8") as file:
        for place, number in enumerate(data.numbers.tolist()):
            line: dict[str, Any] = {"example": number, "source": None, "length": int(lengths[number])}
            if origins is not None:
                line["source"] = {"uri": _source(data.corpus, number), **origins.of(number)}
            line |= data.task.shown(data.corpus, number)
            line |= {who: data.task.said(each.fields, place) for who, each in predictions.items()}
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    aside.replace(path)


def _source(corpus: Corpus, number: int) -> str:
    return str(corpus.meta["sources"][int(corpus.values("source")[number])])


def flat_metrics(results: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The figures that a script wants: `model.loss`, and how sure they are."""
    flat: dict[str, Any] = {f"{who}.{metric}": value for who in names for metric, value in results[who].items()}
    return flat | {part: results[part] for part in ("intervals", "differences", "gaps", "benchmarks") if results[part]}
