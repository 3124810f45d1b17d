"""What a preprocess left: counts of rows, and for each corpus its examples, tokens and percentiles of length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.data.sources import Rejected
from llmkit.run.directory import Run
from llmkit.stages.rows import RecipeRows


def corpus_statistics(corpora: dict[str, Corpus], rows: RecipeRows, rejected: Sequence[Rejected]) -> dict[str, Any]:
    """Counts of rows, and for each corpus its examples, tokens and percentiles of length."""
    found: dict[str, Any] = {
        "rows_read": rows.read,
        "rows_rejected": len(rejected),
        "rows_filtered": dict(rows.taken_by_filter),
        "corpora": {},
    }
    for name, corpus in corpora.items():
        lengths = corpus.lengths("input_ids")
        entry = {key: corpus.meta[key] for key in ("rows", "rows_cut", "tokens_cut")}
        entry |= {"examples": len(corpus), "tokens": int(lengths.sum())}
        if "supervised" in corpus.columns:
            entry["supervised_tokens"] = int(np.sum(corpus.values("supervised")))
        if len(corpus):
            entry["length_percentiles"] = {str(p): int(np.percentile(lengths, p)) for p in (0, 5, 25, 50, 75, 95, 100)}
        found["corpora"][name] = entry
    if rows.labels:
        numbers = corpora["train"].values("label")
        counts = np.bincount(np.asarray(numbers, np.int64), minlength=len(rows.labels))
        found["train_labels"] = dict(zip(rows.labels, map(int, counts), strict=True))
    return found


def show_statistics(run: Run, corpora: dict[str, Corpus], statistics: dict[str, Any]) -> None:
    columns = ("corpus", "rows", "examples", "tokens", "supervised", "median length", "longest", "rows cut")
    table = []
    for name in corpora:
        entry = statistics["corpora"][name]
        percentiles = entry.get("length_percentiles", {})
        cells = (entry["rows"], entry["examples"], entry["tokens"], entry.get("supervised_tokens", ""))
        table.append((name, *cells, percentiles.get("50", ""), percentiles.get("100", ""), entry["rows_cut"]))
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
