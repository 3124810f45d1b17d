"""The section on data: lengths, labels, sources, and what became of the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice, zip_longest
from typing import Any

from llmkit.report import figures
from llmkit.report.blocks import Block, Charts, Prose, Section, Table
from llmkit.report.chart import Chart
from llmkit.report.record import Record
from llmkit.report.words import DASH, listed, number, plural

_DROPPED = 20  # examples of what was taken out
_SHOWN_CHARS = 240
_REASONS = 15


def data_section(record: Record) -> Section:
    """What the model learnt from and was scored on. Empty before preprocess is done."""
    statistics = record.statistics
    if statistics is None:
        return Section("data", "The data", ())
    corpora = {name: entry for name, entry in statistics.get("corpora", {}).items() if entry.get("examples")}
    charts = [*_charts(corpora), *_fate(statistics)]
    blocks: list[Block] = [_counts(corpora)] if corpora else []
    if charts:
        blocks.append(Charts(charts))
    blocks += _leaks(statistics)
    blocks += _filters(statistics)
    blocks += _dropped(record, statistics)
    return Section("data", "The data", blocks)


def _counts(corpora: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, entry in corpora.items():
        lengths = entry.get("length_percentiles") or {}
        row = [entry.get(key) for key in ("rows", "examples", "tokens", "supervised_tokens")]
        row += [lengths.get("50"), lengths.get("95"), lengths.get("100"), entry.get("rows_cut")]
        rows.append([_corpus(name), *map(number, row)])
    columns = (
        "data",
        "rows",
        "examples",
        "tokens",
        "supervised",
        "median length",
        "95th percentile",
        "longest",
        "rows cut",
    )
    return Table("Counts, lengths in tokens", columns, rows)


def _corpus(name: str) -> str:
    return {"eval": "held out", "pretrain-eval": "pretrain, held out", "general": "general text"}.get(name, name)


def _charts(corpora: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    charts: list[Chart] = []
    groups = (("train", "eval"), ("pretrain", "pretrain-eval"))
    rest = [(name,) for name in corpora if not any(name in group for group in groups)]
    for group in (*groups, *rest):
        names = [name for name in group if (corpora.get(name) or {}).get("lengths_up_to")]
        if not names:
            continue
        title = f"Lengths, {listed([_corpus(name) for name in names])}"
        counts = {_corpus(name): corpora[name]["lengths_up_to"] for name in names}
        charts.append(figures.grouped_bars(f"lengths-{len(charts)}", title, counts, "tokens"))
    for name, entry in corpora.items():
        for key in ("labels", "sources"):
            found = entry.get(key) or {}
            if len(found) > 1:
                ordered = sorted(found.items(), key=lambda item: -item[1])
                title = f"{key.capitalize()}, {_corpus(name)}"
                charts.append(figures.bars(f"{key}-{len(charts)}", title, ordered, most=20 if key == "labels" else 12))
    return charts


def _fate(statistics: Mapping[str, Any]) -> list[Chart]:
    """From the rows that were read to those that were kept."""
    read = int(statistics.get("rows_read") or 0)
    taken = [(name, int(count), "taken") for name, count in (statistics.get("rows_filtered") or {}).items() if count]
    rejected = int(statistics.get("rows_rejected") or 0)
    if rejected:
        taken.insert(0, ("cannot be used", rejected, "taken"))
    if not read or not taken:
        return []
    kept = read - sum(count for _, count, _ in taken)
    rows = [("rows read", read, "kept"), *taken, ("rows kept", max(kept, 0), "kept")]
    return [figures.funnel("fate", "What became of the rows", rows)]


def _leaks(statistics: Mapping[str, Any]) -> list[Block]:
    """What training and held-out data have in common."""
    rows = [
        [_corpus(name), *(number(found.get(key)) for key in ("exact", "near", "passages")), _covered(found)]
        for name, found in (statistics.get("leaks") or {}).items()
    ]
    if not rows:
        return []
    columns = ("examples of", "held out too", "nearly so", "share a passage", "held-out examples found in pieces")
    return [Table("What training and held-out data have in common", columns, rows)]


def _covered(found: Mapping[str, Any]) -> str:
    return f"{number(found.get('held_out_covered'))} of {number(found.get('held_out'))}"


def _filters(statistics: Mapping[str, Any]) -> list[Block]:
    """What each filter took out and changed, by reason."""
    rows = []
    for name, entry in (statistics.get("filters") or {}).items():
        for what, key in (("took out", "taken_out"), ("changed", "changed")):
            ordered = sorted((entry.get(key) or {}).items(), key=lambda item: -item[1])
            rows += [[name, what, str(reason), f"{count:,}"] for reason, count in ordered[:_REASONS]]
            if len(ordered) > _REASONS:
                rest = sum(count for _, count in ordered[_REASONS:])
                rows.append([name, what, f"{len(ordered) - _REASONS} other reasons", f"{rest:,}"])
    reasons = sorted((statistics.get("rejected") or {}).items(), key=lambda item: -item[1])
    rows += [["cannot be used", "left out", str(reason), f"{count:,}"] for reason, count in reasons[:_REASONS]]
    columns = ("filter", "", "what", "rows or places")
    return [Table("What each filter did", columns, rows, frozenset({1, 2}))] if rows else []


def _dropped(record: Record, statistics: Mapping[str, Any]) -> list[Block]:
    """Some rows that were taken out; the text only of those that nothing in it had to be masked."""
    by_filter = [
        [[sample["where"], f"{name}: {sample['reason']}", _short(str(sample["text"]))] for sample in entry["samples"]]
        for name, entry in (statistics.get("filters") or {}).items()
        if entry.get("samples")
    ]
    rows = [row for turn in zip_longest(*by_filter) for row in turn if row][:_DROPPED]
    shown = {row[0] for row in rows}
    silent = False
    for where, reason in _left_out(record, _DROPPED - len(rows), shown):
        rows.append([where, reason, DASH])
        silent = True
    if not rows:
        return []
    total = int(statistics.get("rows_rejected") or 0) + sum((statistics.get("rows_filtered") or {}).values())
    caption = f"{len(rows)} of the {plural(total, 'row')} that were dropped"
    blocks: list[Block] = [Table(caption, ("where", "why", "text"), rows, frozenset({1, 2}))]
    if silent:
        blocks.append(
            Prose(
                "The text of a row is left out where it could not be read, or where it was dropped before secrets and "
                "personal data in it would have been masked."
            )
        )
    return blocks


def _left_out(record: Record, most: int, shown: set[str]) -> list[tuple[str, str]]:
    """Places and reasons from rejected.jsonl, one for each reason first."""
    path = record.path / "preprocess" / "rejected.jsonl"
    if most <= 0 or not path.is_file():
        return []
    first: dict[str, tuple[str, str]] = {}
    more: list[tuple[str, str]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in islice(file, 100_000):
            try:
                line = json.loads(text)
                where, reason = f"{line['source']}:{line['line']}", str(line["reason"])
            except (ValueError, KeyError, TypeError):
                continue
            if where in shown:
                continue
            if reason not in first:
                first[reason] = (where, reason.removeprefix("filter "))
            elif len(more) < most:
                more.append((where, reason.removeprefix("filter ")))
    return [*first.values(), *more][:most]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 1] + "…"
