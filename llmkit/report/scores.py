"""The sections on scores: did it get better, where, and how it errs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.report import figures
from llmkit.report.blocks import Block, Charts, Matrix, Prose, Section, Table
from llmkit.report.chart import Chart
from llmkit.report.names import legend, name_of
from llmkit.report.record import Record
from llmkit.report.verdict import changes, examples_of, headline_metric, verdict
from llmkit.report.words import DASH, interval, listed, number, p_value, plural, signed, title_of

_MOST_LABELS = 30  # of a confusion matrix
_MOST_SLICES = 24  # of a chart


def score_section(record: Record) -> Section:
    """The verdict, all scores, and what else was measured."""
    results = record.results
    if results is None:
        return Section("scores", question(record), ())
    found = verdict(record)
    blocks: list[Block] = [Prose(found.more)] if found and found.more else []
    blocks += [Prose(told)] if (told := legend(record)) else []
    blocks += [_scores(results, who, record.others) for who in record.others] or [_scores_alone(results)]
    blocks += _reasons(results)
    blocks += _data_sets(record, results)
    blocks += _benchmarks(results, record.others)
    return Section("scores", question(record) if record.others else "Scores", blocks)


def question(record: Record) -> str:
    """What scores beside those of other models answer."""
    return "Which is better?" if record.only_scores else "Did it get better?"


def _reasons(results: Mapping[str, Any]) -> list[Block]:
    """Why some metrics have no value or no interval."""
    told: dict[str, dict[str, None]] = defaultdict(dict)
    for some in (results.get("reasons") or {}).values():
        for metric, why in some.items() if isinstance(some, dict) else ():
            told[str(why)][title_of(metric)] = None
    return [Prose(f"{listed(list(metrics))}: {why}.") for why, metrics in told.items()]


def _scores(results: Mapping[str, Any], who: str, others: Sequence[str]) -> Table:
    """Both models' scores, and the difference."""
    intervals = results.get("intervals") or {}
    rows, marks = [], {}
    for place, change in enumerate(changes(results, who)):
        bounds = [interval((intervals.get(one) or {}).get(change.metric)) for one in (who, "model")]
        rows.append(
            [
                _titled(results, change.metric),
                _with(number(change.before), bounds[0]),
                _with(number(change.after), bounds[1]),
                signed(change.difference),
                interval([change.low, change.high]) or DASH,
                p_value(change.p) or DASH,
                change.judgement or DASH,
            ]
        )
        if change.mark:
            marks[place, 6] = change.mark
    examples = plural(int(results.get("examples") or 0), "held-out example")
    columns = ("metric", name_of(who, others), name_of("model", others), "difference", "95 % interval", "p", "verdict")
    return Table(f"Scores over {examples}", columns, rows, frozenset({6}), marks)


def _titled(results: Mapping[str, Any], metric: str) -> str:
    """A metric's name, with the number of examples that it is made of where those are not all."""
    fewer = (results.get("scored") or {}).get(metric)
    return title_of(metric) + (f", of {plural(int(fewer), 'example')}" if fewer else "")


def _with(value: str, bounds: str) -> str:
    return f"{value} ({bounds})" if bounds else value


def _scores_alone(results: Mapping[str, Any]) -> Table:
    bounds = (results.get("intervals") or {}).get("model") or {}
    rows = [
        [_titled(results, metric), number(value), interval(bounds.get(metric)) or DASH]
        for metric, value in results["model"].items()
        if isinstance(value, int | float)
    ]
    examples = plural(int(results.get("examples") or 0), "held-out example")
    return Table(f"Scores over {examples}", ("metric", "value", "95 % interval"), rows)


def _data_sets(record: Record, results: Mapping[str, Any]) -> list[Block]:
    """Scores on each data set, and the gaps between them."""
    blocks: list[Block] = []
    sets = results.get("data_sets") or {}
    metric = headline_metric(record)
    if sets and metric:
        who = [one for one in (*record.others, "model") if any(one in found for found in sets.values())]
        rows = []
        for name, found in sets.items():
            cells = [
                _with(
                    number((found.get(one) or {}).get(metric)),
                    interval(((found.get("intervals") or {}).get(one) or {}).get(metric)),
                )
                for one in who
            ]
            rows.append([name, f"{examples_of(found, metric):,}", *cells])
        columns = ("data", "examples", *(f"{title_of(metric)}, {name_of(one, who)}" for one in who))
        blocks.append(Table("Scores by data set", columns, rows))
    gaps = results.get("gaps") or []
    gaps = [gap for gap in gaps if gap.get("metric") == metric] or gaps
    if gaps:
        who = [str(gap.get("who", "model")) for gap in gaps]
        rows = [
            [
                f"{gap.get('kind') or 'gap'}, {title_of(str(gap.get('metric', '')))}",
                str(gap.get("from", "")).replace("_", " "),
                str(gap.get("to", "")).replace("_", " "),
                name_of(str(gap.get("who", "model")), who),
                signed(gap.get("gap")),
                interval([gap.get("low"), gap.get("high")]) or DASH,
            ]
            for gap in gaps
        ]
        columns = ("gap", "from", "to", "model", "difference", "95 % interval")
        blocks.append(Table("Gaps between data sets", columns, rows, frozenset({1, 2, 3})))
    return blocks


def _benchmarks(results: Mapping[str, Any], others: Sequence[str]) -> list[Block]:
    """Public benchmarks, as lm-eval scores them."""
    found = results.get("benchmarks") or {}
    who = sorted(found, key=lambda one: one == "model")
    pairs = dict.fromkeys(
        (task, metric)
        for scores in found.values()
        for task, values in scores.items()
        for metric, value in values.items()
        if isinstance(value, int | float)
    )
    if not pairs:
        return []
    rows = [
        [f"{task}, {title_of(metric)}", *(number((found[one].get(task) or {}).get(metric)) for one in who)]
        for task, metric in pairs
    ]
    return [Table("Public benchmarks", ("task", *(name_of(one, others) for one in who)), rows)]


def slice_section(record: Record) -> Section:
    """The headline metric by label, source, length or whatever the recipe names."""
    results, metric = record.results, headline_metric(record)
    found = (results or {}).get("slices") or []
    who = [*record.others, "model"]
    blocks: list[Block] = []
    charts: list[Chart] = []
    for by in dict.fromkeys(str(entry["by"]) for entry in found):
        rows = [entry for entry in found if str(entry["by"]) == by]
        if metric is None or not any(metric in (entry.get("model") or {}) for entry in rows):
            continue
        if len(rows) <= _MOST_SLICES:
            drawn = [(f"{entry['value']}", ranges) for entry in rows if (ranges := _ranges(entry, metric, who))]
            title = f"{title_of(metric)[0].upper()}{title_of(metric)[1:]} by {by}"
            charts.append(figures.ranges(f"slices-{len(charts)}", title, metric, drawn, who))
        blocks.append(_slice_table(by, metric, rows, who))
    return Section("slices", "Where it is good", [Charts(charts), *blocks] if charts else blocks)


def _ranges(entry: Mapping[str, Any], metric: str, who: Sequence[str]) -> dict[str, tuple[float, Any]]:
    intervals = entry.get("intervals") or {}
    return {
        one: (float(entry[one][metric]), (intervals.get(one) or {}).get(metric))
        for one in who
        if isinstance((entry.get(one) or {}).get(metric), int | float)
    }


def _slice_table(by: str, metric: str, entries: Sequence[Mapping[str, Any]], who: Sequence[str]) -> Table:
    """Scores by slice, with a column of reasons where one has none."""
    rows, lacks = [], [_lack(entry, metric, who) for entry in entries]
    for entry, lack in zip(entries, lacks, strict=True):
        ranges = _ranges(entry, metric, who)
        cells = [_with(number(ranges[one][0]), interval(ranges[one][1])) if one in ranges else DASH for one in who]
        rows.append([str(entry["value"]), f"{examples_of(entry, metric):,}", *cells, *([lack] if any(lacks) else [])])
    columns = (by, "examples", *(f"{title_of(metric)}, {name_of(one, who)}" for one in who))
    if not any(lacks):
        return Table(f"{title_of(metric)} by {by}", columns, rows)
    return Table(f"{title_of(metric)} by {by}", (*columns, "why there is none"), rows, frozenset({len(columns)}))


def _lack(entry: Mapping[str, Any], metric: str, who: Sequence[str]) -> str:
    """Why a slice has no score of some model; nothing where it has all."""
    without = [one for one in who if not isinstance((entry.get(one) or {}).get(metric), int | float)]
    reasons = [((entry.get("reasons") or {}).get(one) or {}).get(metric) for one in without]
    return listed(list(dict.fromkeys(str(why or "no example that can be scored") for why in reasons)))


def error_section(record: Record) -> Section:
    """The confusion matrix, what is most often taken for what, and scores by label."""
    tables = ((record.results or {}).get("tables") or {}).get("model") or {}
    blocks: list[Block] = []
    labels, counts = tables.get("labels"), tables.get("confusion_matrix")
    if labels and counts:
        blocks += _confusion(list(map(str, labels)), counts)
    by_label = tables.get("by_label") or {}
    if by_label:
        names = list(next(iter(by_label.values())))
        rows = [[str(name), *(number(found.get(key)) for key in names)] for name, found in by_label.items()]
        blocks.append(Table("Scores by label", ("label", *map(title_of, names)), rows))
    found = tables.get("calibration") or {}
    bins, after = ([b for b in found.get(name) or [] if b.get("examples")] for name in ("bins", "bins_after"))
    if bins:
        blocks.append(Charts([figures.calibration("calibration", "Calibration", bins, after)]))
    if found.get("temperature"):
        fitted = f" Fitted on {found['fitted_on']}." if found.get("fitted_on") else ""
        blocks.append(Prose(f"Its logits divided by {number(found['temperature'])} have the least loss.{fitted}"))
    return Section("errors", "Errors by label", blocks)


def _confusion(labels: list[str], counts: Sequence[Sequence[int]]) -> list[Block]:
    blocks: list[Block] = []
    pairs = [
        (count, labels[is_], labels[said])
        for is_, row in enumerate(counts)
        for said, count in enumerate(row)
        if is_ != said and count
    ]
    pairs.sort(key=lambda pair: -pair[0])
    if len(labels) <= _MOST_LABELS:
        shares = [[round(100 * count / max(sum(row), 1)) for count in row] for row in counts]
        caption = (
            "Confusion matrix: rows are what it is, columns what the model says, darker is a larger share of a row"
        )
        blocks.append(Matrix(caption, labels, counts, shares))
    if pairs:
        rows = [[is_, said, f"{count:,}"] for count, is_, said in pairs[:10]]
        blocks.append(Table("Most frequent errors", ("it is", "the model says", "times"), rows, frozenset({1})))
    return blocks
