"""The section on how the scores grow with the data, of a run that has a learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmkit.report.blocks import Block, Charts, Prose, Section, Table
from llmkit.report.chart import HUES, Chart, draw
from llmkit.report.record import Record
from llmkit.report.verdict import headline_metric
from llmkit.report.words import duration, interval, listed, number, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curve_section(record: Record) -> Section:
    """From learning_curve.json: the headline metric by training examples as a chart, and all scores by share."""
    curve, title = record.learning_curve, "How much more data helps"
    points = [point for point in (curve or {}).get("points") or [] if point.get("scores")]
    if curve is None or not points:
        return Section("learning-curve", title, ())
    before = curve.get("before") or {}
    blocks: list[Block] = []
    if _is_of_another_model(record, points):
        text = "The run has learnt anew since this curve was made; `llmkit evaluate --learning-curve` brings it up to date."
        blocks.append(Prose(text))
    metric = headline_metric(record) or next(iter(points[-1]["scores"]))
    drawn = [point for point in points if metric in point["scores"] and point.get("train_examples")]
    if len(drawn) > 1:
        blocks.append(Charts([_chart(metric, drawn, before)]))
    blocks.append(_table(curve, points, before))
    return Section("learning-curve", title, [*blocks, *not_compared(curve)])


def not_compared(found: Mapping[str, Any]) -> list[Block]:
    """Which metrics several runs of a recipe leave out, and why."""
    left_out = found.get("left_out")
    if not left_out:
        return []
    names = listed([title_of(name) for name in left_out["metrics"]])
    return [Prose(f"Not compared: {names}, because {left_out['why']}.")]


def _is_of_another_model(record: Record, points: Sequence[Mapping[str, Any]]) -> bool:
    whole = next((point["scores"] for point in points if point.get("run") == "."), None)
    now = (record.results or {}).get("model") or {}
    return whole is not None and any(now.get(metric, value) != value for metric, value in whole.items())


def _chart(metric: str, points: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> Chart:
    """Scores with their intervals over training examples; what the model scored before is a line."""
    name = title_of(metric)
    counts = [int(point["train_examples"]) for point in points]
    values = [float(point["scores"][metric]) for point in points]
    ranges = [(point.get("intervals") or {}).get(metric) for point in points]
    start = (before.get("scores") or {}).get(metric)
    told = [f"{number(value)} with {count:,} examples" for count, value in zip(counts, values, strict=True)]
    told += [f"{number(start)} before training"] if start is not None else []

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import EngFormatter

        for count, bounds in zip(counts, ranges, strict=True):
            if bounds:
                axes.plot([count, count], bounds, color=HUES[0], lw=1.6, solid_capstyle="butt")
        axes.plot(counts, values, "o-", color=HUES[0], ms=4.2, lw=1.2, label="after")
        if start is not None:
            axes.axhline(start, color=HUES[1], ls="--", lw=1.2, label="before")
            axes.legend()
        axes.set_xlim(0, max(counts) * 1.06)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("training examples")
        axes.set_ylabel(name)

    title = f"{name[0].upper()}{name[1:]} by training examples, with 95 % intervals"
    return draw("learning-curve", title, "; ".join(told) + ".", paint)


def _table(curve: Mapping[str, Any], points: Sequence[Mapping[str, Any]], before: Mapping[str, Any]) -> Table:
    """A row for each metric, a column for each share."""
    start = [{"share": "before", "train_examples": 0, **before}] if before else []
    shown = [*start, *points]

    def score(point: Mapping[str, Any], metric: str) -> str:
        bounds = interval((point.get("intervals") or {}).get(metric))
        return number((point.get("scores") or {}).get(metric)) + (f" ({bounds})" if bounds else "")

    rows = [
        ["training examples", *(number(point.get("train_examples")) for point in shown)],
        ["time", *(duration(point.get("seconds")) for point in shown)],
    ]
    rows += [[title_of(metric), *(score(point, metric) for point in shown)] for metric in points[-1]["scores"]]
    caption = f"Scores over {number(curve.get('examples'))} held-out examples, by share of the training data"
    return Table(caption, ("", *(str(point["share"]) for point in shown)), rows)
