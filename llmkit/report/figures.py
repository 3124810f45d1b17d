"""The plots of the pages: curves, bars, intervals, the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmkit.report.chart import FROZEN, HUES, INK, LEARNING, LINES, MUTED, PAPER, THAWING, Chart, draw, label
from llmkit.report.log import Curve
from llmkit.report.model_parts import ADAPTED, LEARNS, MIXED, STILL, THAWS, Part
from llmkit.report.names import name_of
from llmkit.report.words import listed, measure, number, plural, short_count, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKED = 40  # points of a curve, up to which each has a mark
_COLOURS = {STILL: FROZEN, ADAPTED: LEARNING, LEARNS: LEARNING, THAWS: THAWING, MIXED: THAWING}
_HATCHES = {STILL: "////", ADAPTED: "////", LEARNS: None, THAWS: "--", MIXED: "xx"}


def curves(key: str, title: str, named: Mapping[str, Curve], unit: str, *, log: bool = False) -> Chart:
    """Curves over steps; where many steps are drawn as one, a band from the lowest to the highest value is around them."""
    told = [f"{name}: {_told(curve, unit)}" for name, curve in named.items()]

    def paint(axes: Axes) -> None:
        from matplotlib.ticker import EngFormatter, MaxNLocator

        for (name, curve), hue, line in zip(named.items(), HUES * 9, LINES * 9, strict=False):
            points = curve.points()
            scale = 2**30 if unit == "bytes" else 1
            mark = "o" if len(points.steps) <= _MARKED else None
            axes.plot(
                points.steps, points.mean / scale, line, color=hue, marker=mark, ms=2.8, lw=1.4, label=label(name)
            )
            if points.is_thinned:
                axes.fill_between(points.steps, points.low / scale, points.high / scale, color=hue, alpha=0.22, lw=0)
        axes.set_xlabel("step")
        begin, end = min(curve.first[0] for curve in named.values()), max(curve.last[0] for curve in named.values())
        if begin == end:
            axes.set_xlim(begin - 1, end + 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if unit == "tokens / s":
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        elif not log:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        axes.set_ylabel({"bytes": "GiB", "": title.rpartition(": ")[2].lower()}.get(unit, unit))
        if log:
            axes.set_yscale("log")
        elif unit in ("bytes", "tokens / s"):
            axes.set_ylim(0, axes.get_ylim()[1] * 1.06)
        if len(named) > 1:
            axes.legend()

    return draw(key, title, "; ".join(told) + ".", paint)


def _told(curve: Curve, unit: str) -> str:
    """What a curve does, for those who do not see it."""
    key = {"bytes": "bytes", "tokens / s": "tokens_per_second"}.get(unit, "")
    first, last = measure(key, curve.first[1]), measure(key, curve.last[1])
    text = f"from {first} at step {curve.first[0]:,} to {last} at step {curve.last[0]:,}"
    return f"{text}, lowest {measure(key, curve.lowest[1])} at step {curve.lowest[0]:,}"


def grouped_bars(key: str, title: str, counts: Mapping[str, Mapping[str, int]], what: str) -> Chart:
    """For each corpus the share of its examples in each bin: upright bars beside each other, such as lengths."""
    bins = sorted({name for found in counts.values() for name in found}, key=float)
    told = []
    for name, found in counts.items():
        most = max(found, key=lambda bin_: found[bin_])
        told.append(f"{name}: {plural(sum(found.values()), 'example')}, most of them up to {most} {what}")

    def paint(axes: Axes) -> None:
        width = 0.8 / len(counts)
        for place, ((name, found), hue) in enumerate(zip(counts.items(), HUES * 9, strict=False)):
            total = max(sum(found.values()), 1)
            xs = [x + (place - (len(counts) - 1) / 2) * width for x in range(len(bins))]
            shares = [100 * found.get(bin_, 0) / total for bin_ in bins]
            axes.bar(xs, shares, width * 0.92, color=hue, label=label(name), hatch=(None, "////", "xx")[place % 3])
        axes.set_xticks(range(len(bins)), [f"≤ {int(bin_):,}" for bin_ in bins])
        if len(bins) > 7:
            axes.tick_params(axis="x", labelrotation=45)
        axes.set_xlabel(what)
        axes.set_ylabel("% of examples")
        axes.grid(visible=False, axis="x")
        if len(counts) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    return draw(key, title, "; ".join(told) + ".", paint)


def bars(key: str, title: str, counts: Sequence[tuple[str, int]], *, hue: str = HUES[0], most: int = 20) -> Chart:
    """Named counts as lying bars, the rest of many as one."""
    shown = list(counts[:most])
    if len(counts) > most:
        rest = counts[most:]
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    told = ", ".join(f"{label(name)} {count:,}" for name, count in shown)

    def paint(axes: Axes) -> None:
        places = range(len(shown))
        axes.barh(places, [count for _, count in shown], color=hue, height=0.72)
        axes.set_yticks(places, [label(name) for name, _ in shown])
        axes.invert_yaxis()
        _counts_beside(axes, [count for _, count in shown])

    return draw(key, title, f"{told}.", paint, height=0.55 + 0.2 * len(shown))


def _counts_beside(axes: Axes, counts: Sequence[int]) -> None:
    longest = max(counts, default=1) or 1
    for place, count in enumerate(counts):
        axes.text(count + longest * 0.012, place, f"{count:,}", va="center", fontsize=8.5)
    axes.set_xlim(0, longest * 1.16)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)


def funnel(key: str, title: str, rows: Sequence[tuple[str, int, str]]) -> Chart:
    """What was left of the rows after each step: name, rows, and `kept` or `taken`."""
    told = ", ".join(f"{name} {count:,}" for name, count, _ in rows)

    def paint(axes: Axes) -> None:
        hues = [HUES[0] if kind == "kept" else HUES[1] for _, _, kind in rows]
        hatches = [None if kind == "kept" else "////" for _, _, kind in rows]
        drawn = axes.barh(range(len(rows)), [count for _, count, _ in rows], color=hues, height=0.72)
        for bar, hatch in zip(drawn, hatches, strict=True):
            bar.set_hatch(hatch)
        axes.set_yticks(range(len(rows)), [label(name) for name, _, _ in rows])
        axes.invert_yaxis()
        _counts_beside(axes, [count for _, count, _ in rows])

    return draw(key, title, f"{told}.", paint, height=0.55 + 0.2 * len(rows))


def ranges(
    key: str, title: str, metric: str, rows: Sequence[tuple[str, Mapping[str, tuple[float, Any]]]], who: Sequence[str]
) -> Chart:
    """Values with their intervals, a line for each row and a mark for each model: `who` -> value, [low, high] or None."""
    names = {one: name_of(one, who) for one in who}
    told = [
        f"{label(name)}: " + ", ".join(f"{names[one]} {number(found[one][0])}" for one in who if one in found)
        for name, found in rows
    ]

    def paint(axes: Axes) -> None:
        for at, one in enumerate(who):
            shift = (at - (len(who) - 1) / 2) * 0.24
            hue, mark = HUES[at % len(HUES)], "osD^v"[at % 5]
            for place, (_, found) in enumerate(rows):
                if one not in found:
                    continue
                value, bounds = found[one]
                if isinstance(bounds, list | tuple) and None not in bounds:
                    axes.plot(bounds, [place + shift] * 2, color=hue, lw=1.6, solid_capstyle="butt")
                axes.plot([value], [place + shift], mark, color=hue, ms=4.2)
            axes.plot([], [], f"{mark}-", color=hue, ms=4.2, label=label(names[one]))
        axes.set_yticks(range(len(rows)), [label(name) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlabel(title_of(metric))
        axes.grid(visible=False, axis="y")
        if len(who) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(who), 3))

    return draw(key, title, "; ".join(told) + ".", paint, height=0.95 + 0.26 * len(rows))


def calibration(
    key: str, title: str, bins: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]] = ()
) -> Chart:
    """How often the model is right, by how sure it is; on the line it is as sure as it is right.

    `after` is the same of its logits divided by a temperature.
    """
    curves = [("the model", bins), *([("with its temperature", after)] if after else [])]
    told = [
        f"{name}: sure {bin_['confidence']:.0%}, right {bin_['accuracy']:.0%} of "
        f"{plural(int(bin_['examples']), 'example')}"
        for name, some in curves
        for bin_ in some
    ]

    def paint(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], "--", color=MUTED, lw=1, label="as sure as right")
        for hue, (name, some) in zip(HUES, curves, strict=False):
            sure, right = ([bin_[part] for bin_ in some] for part in ("confidence", "accuracy"))
            most = max(bin_["examples"] for bin_ in some)
            axes.plot(sure, right, color=hue, lw=1)
            axes.scatter(sure, right, [12 + 90 * bin_["examples"] / most for bin_ in some], color=hue, label=name)
        axes.set_xlabel("probability of what it says")
        axes.set_ylabel("share that is right")
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.06)
        axes.legend()

    return draw(key, title, "; ".join(told) + ".", paint)


def model_picture(key: str, parts: Sequence[Part]) -> Chart:
    """The model from its input on the left to its output on the right: what stands still, what learns, what thaws."""
    rows: dict[str | None, list[Part]] = {}
    before = list(parts[: _first_block(parts)])
    after = [part for part in parts if not part.stack and part not in before]
    for part in parts:
        if part.stack:
            rows.setdefault(part.stack, []).append(part)
    stacks = list(rows.values()) or [[]]
    states = [state for state in (STILL, ADAPTED, LEARNS, THAWS, MIXED) if any(part.state == state for part in parts)]
    told = listed([f"{sum(p.state == state for p in parts)} of {len(parts)} parts: {state}" for state in states])

    def paint(axes: Axes) -> None:
        from matplotlib.patches import Patch

        for row, blocks in enumerate(stacks):
            lead = before if row == 0 else []
            tail = after if row == len(stacks) - 1 else []
            _paint_row(axes, row, lead, blocks, tail)
        patches = [
            Patch(facecolor=_COLOURS[state], edgecolor=PAPER, hatch=_HATCHES[state], label=state) for state in states
        ]
        axes.legend(handles=patches, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(patches))
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(len(stacks) - 0.28, -0.3)
        axes.axis("off")

    return draw(key, "The model, from input to output", f"{told}.", paint, height=0.35 + 0.8 * len(stacks))


def _first_block(parts: Sequence[Part]) -> int:
    return next((place for place, part in enumerate(parts) if part.stack), len(parts))


def _paint_row(axes: Axes, row: int, lead: Sequence[Part], blocks: Sequence[Part], tail: Sequence[Part]) -> None:
    """One stack of blocks between what leads in and what follows; each beside part is as wide as a few blocks."""
    from matplotlib.patches import Rectangle

    wide = max(1.0, len(blocks) / 9)
    widths = [wide] * len(lead) + [1.0] * len(blocks) + [wide] * len(tail)
    total, left = sum(widths) or 1.0, 0.0
    edges = {}
    for part, width in zip([*lead, *blocks, *tail], widths, strict=True):
        share = width / total
        gap = min(0.12 * share, 0.006)
        axes.add_patch(
            Rectangle(
                (left + gap / 2, row - 0.25),
                share - gap,
                0.5,
                facecolor=_COLOURS[part.state],
                edgecolor=PAPER,
                linewidth=0.4,
                hatch=_HATCHES[part.state],
            )
        )
        edges[id(part)] = (left, left + share)
        if not part.stack:
            text = label(part.name.rpartition(".")[2], 13)
            axes.text(left + share / 2, row + 0.33, text, ha="center", va="top", fontsize=8, color=INK, rotation=18)
        left += share
    if blocks:
        middle = (edges[id(blocks[0])][0] + edges[id(blocks[-1])][1]) / 2
        size = [part.parameters for part in blocks]
        each = "" if None in size else f", {short_count(max(s or 0 for s in size))} parameters each"
        text = f"{blocks[0].stack}.{blocks[0].number}\u2013{blocks[-1].number}{each}"
        axes.text(middle, row + 0.46, label(text, 60), ha="center", va="top", fontsize=8, color=MUTED)
