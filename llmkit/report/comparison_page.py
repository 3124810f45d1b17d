"""Several runs on one page, like the report of one."""

from __future__ import annotations

from llmkit.report import figures
from llmkit.report.blocks import Block, Charts, Section, Table
from llmkit.report.chart import Chart
from llmkit.report.comparison import COSTS, Comparison, costs, losses, score_interval, scores, shown_value
from llmkit.report.log import Curve
from llmkit.report.render import render
from llmkit.report.words import DASH, duration, interval, listed, measure, number, title_of

_CURVES = (
    ("loss", "training loss"),
    ("eval_loss", "held-out loss"),
    ("lr", "learning rate"),
    ("tokens_per_second", "speed"),
)


def comparison_html(found: Comparison) -> str:
    """The page as text."""
    sections = (_scores(found), _curves(found), _costs(found), _keys(found))
    return render(
        "compare.html.j2",
        title=listed(list(found.names)),
        notes=found.notes,
        sections=[section for section in sections if section.blocks],
    )


def score_rows(found: Comparison) -> list[list[str]]:
    """A row for each metric, a column for each run."""
    rows = []
    for metric in found.metrics:
        row = [title_of(metric)]
        for record in found.records:
            bounds = interval(score_interval(record, metric))
            row.append(number(scores(record).get(metric)) + (f" ({bounds})" if bounds else ""))
        rows.append(row)
    return rows


def loss_rows(found: Comparison) -> list[list[str]]:
    """Where the curves of each stage ended."""
    keys = ("steps", "last_train_loss", "last_eval_loss", "best_eval_loss", "best_step")
    names = ("steps", "last training loss", "last held-out loss", "lowest held-out loss", "at step")
    rows = []
    for stage in found.stages:
        ends = [losses(record, stage) for record in found.records]
        for key, name in zip(keys, names, strict=True):
            if any(key in end for end in ends):
                rows.append([f"{stage}: {name}", *(number(end.get(key)) for end in ends)])
    return rows


def cost_rows(found: Comparison) -> list[list[str]]:
    """Time, tokens, speed and memory."""
    each = [costs(record) for record in found.records]
    names = {"train_seconds": "training", "train_tokens": "tokens", "tokens_per_second": "tokens / s", "flops": "FLOPs"}
    rows = [["all stages", *(duration(cost["seconds"]) for cost in each)]]
    for key in COSTS:
        if any(key in cost for cost in each):
            name = names.get(key, key.removesuffix("_bytes").replace("_", " "))
            cells = [
                f"{cost[key]:,.0f}" if key == "tokens_per_second" and key in cost else measure(key, cost.get(key))
                for cost in each
            ]
            rows.append([name, *cells])
    return rows


def key_rows(found: Comparison) -> list[list[str]]:
    """The recipe keys that differ."""
    return [[key, *map(shown_value, values)] for key, values in found.keys.items()]


def _scores(found: Comparison) -> Section:
    rows = score_rows(found)
    caption = "Scores, with 95 % intervals where there are any"
    blocks: list[Block] = [Table(caption, ("metric", *found.names), rows)] if rows else []
    charts: list[Chart] = []
    for metric in found.metrics if found.comparable else ():
        drawn = [
            (name, {"model": (scores(record)[metric], score_interval(record, metric))})
            for name, record in zip(found.names, found.records, strict=True)
            if metric in scores(record)
        ]
        if len(drawn) > 1 and any(ranges["model"][1] for _, ranges in drawn):
            key, title = f"score-{len(charts)}", title_of(metric)
            charts.append(figures.ranges(key, title[0].upper() + title[1:], metric, drawn, ["model"]))
    if charts:
        blocks.append(Charts(charts))
    return Section("scores", "Scores", blocks)


def _curves(found: Comparison) -> Section:
    charts: list[Chart] = []
    for stage in found.stages:
        for key, title in _CURVES:
            named: dict[str, Curve] = {
                name: curve
                for name, record in zip(found.names, found.records, strict=True)
                if (curve := record.log.curve(stage, key)) is not None
            }
            if named:
                unit = "tokens / s" if key == "tokens_per_second" else ""
                charts.append(figures.curves(f"{stage}-{key}", f"{stage.capitalize()}: {title}", named, unit))
    blocks: list[Block] = [Charts(charts)] if charts else []
    if rows := loss_rows(found):
        blocks.append(Table("Losses", ("", *found.names), rows))
    return Section("curves", "Curves", blocks)


def _costs(found: Comparison) -> Section:
    return Section("cost", "What it took", [Table("Time, tokens and memory", ("", *found.names), cost_rows(found))])


def _keys(found: Comparison) -> Section:
    rows = [[cell or DASH for cell in row] for row in key_rows(found)]
    words = frozenset(range(1, len(found.names) + 1))
    table = Table("Recipe keys that differ", ("key", *found.names), rows, words)
    return Section("recipe", "What differs in the recipes", [table] if rows else [])
