"""What a preprocess left: counts of rows, and for each corpus its examples, tokens and percentiles of length."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.run.directory import Run
from llmkit.stages.rows import RecipeRows


def corpus_statistics(corpora: dict[str, Corpus], rows: RecipeRows, rejected: dict[str, list[Any]]) -> dict[str, Any]:
    """Counts of rows, and for each corpus its examples, tokens and percentiles of length."""
    found: dict[str, Any] = {
        "rows_read": rows.read,
        "rows_rejected": sum(count for count, _ in rejected.values()),
        "rejected": {reason: count for reason, (count, _) in rejected.items()},
        "rows_filtered": {
            name: sum(rows.filtered[name].values()) for name in rows.filter_names() if name in rows.filtered
        },
        "filters": filter_statistics(rows),
        "corpora": {},
    }
    for name, corpus in corpora.items():
        lengths = corpus.lengths("input_ids")
        entry = {key: corpus.meta[key] for key in ("rows", "rows_cut", "tokens_cut")}
        entry |= {"examples": len(corpus), "tokens": int(lengths.sum())}
        if "supervised" in corpus.columns:
            entry["supervised_tokens"] = _total(corpus, "supervised")
        if len(corpus):
            entry["length_percentiles"] = {str(p): int(np.percentile(lengths, p)) for p in (0, 5, 25, 50, 75, 95, 100)}
            entry["lengths_up_to"] = length_histogram(lengths)
        if "text_bytes" in corpus.columns and entry["supervised_tokens"]:
            text_bytes = _total(corpus, "text_bytes")
            entry["bytes_per_token"] = round(text_bytes / entry["supervised_tokens"], 3)
        entry["sources"] = _counted(corpus, "source", corpus.meta["sources"])
        if "label" in corpus.columns:
            entry["labels"] = _counted(corpus, "label", corpus.meta["settings"]["labels"])
        found["corpora"][name] = entry
    return found


def filter_statistics(rows: RecipeRows) -> dict[str, Any]:
    """For each filter what it took out, by reason, what it changed, and samples of what it took out."""
    return {
        name: {
            "taken_out": dict(rows.filtered.get(name, {})),
            "changed": dict(rows.changed.get(name, {})),
            "samples": rows.samples.get(name, []),
        }
        for name in rows.filter_names()
    }


def length_histogram(lengths: np.ndarray) -> dict[str, int]:
    """How many lengths are above half of a power of two and up to it."""
    powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(powers) if len(powers) else np.zeros(0, int)
    return {str(1 << power): int(count) for power, count in enumerate(counts) if count}


def _total(corpus: Corpus, column: str) -> int:
    return sum(int(np.sum(part)) for part in corpus.chunks(column))


def _counted(corpus: Corpus, column: str, names: list[str]) -> dict[str, int]:
    """How often each name's number stands in a column."""
    counts = np.zeros(len(names), np.int64)
    for part in corpus.chunks(column):
        counts += np.bincount(np.asarray(part, np.int64), minlength=len(names))
    return dict(zip(names, map(int, counts), strict=True))


def show_statistics(run: Run, corpora: dict[str, Corpus], statistics: dict[str, Any]) -> None:
    columns = ("corpus", "rows", "examples", "tokens", "supervised", "median", "longest", "rows cut", "bytes/token")
    table = []
    for name in corpora:
        entry = statistics["corpora"][name]
        percentiles = entry.get("length_percentiles", {})
        lengths = (percentiles.get("50", ""), percentiles.get("100", ""))
        cells = (entry["rows"], entry["examples"], entry["tokens"], entry.get("supervised_tokens", ""))
        table.append((name, *cells, *lengths, entry["rows_cut"], entry.get("bytes_per_token")))
    run.reporter.table("corpora", columns, table)
    where = run.folder("preprocess") / "rejected.jsonl"
    for name, count in statistics["rows_filtered"].items():
        run.reporter.note(
            f"taken out by the filter {name}: {count} of {statistics['rows_read']} rows, named in {where}"
        )
    if statistics["rows_rejected"]:
        run.reporter.warn(
            f"cannot be used: {statistics['rows_rejected']} of {statistics['rows_read']} rows, named in {where}"
        )
