"""How results look on a terminal: scores side by side, sample answers, what to type next."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmkit.cli.console import make_table
from llmkit.recipe.schema import Recipe
from llmkit.run.directory import Run

_COLOURS = {"better": "green", "worse": "red"}  # by verdict


def show_metrics(console: Console, title: str, metrics: dict[str, Any]) -> None:
    """What one stage measured."""
    rows = [(key, _readable(key, value)) for key, value in metrics.items() if value is not None]
    console.print(make_table(title, ("", ""), rows))


def show_results(console: Console, results: dict[str, Any]) -> None:
    """Scores side by side with what sets the models apart, parts of the data, then sample answers of each model."""
    others = [name for name in results["models"] if name != "model"]
    console.print()
    title = f"held-out scores over {results['examples']:,} example{'' if results['examples'] == 1 else 's'}"
    console.print(_scores_table(title, results, others))
    _show_reasons(console, results)
    _show_slices(console, results, others)
    _show_data_sets(console, results)
    prompts = _without_common_parts([sample["prompt"] for sample in results["samples"]])
    for sample, prompt in zip(results["samples"], prompts, strict=True):
        console.print(f"\n[dim]prompt[/]     {escape(prompt)}")
        console.print(f"[dim]reference[/]  {escape(sample['reference'])}")
        for name in (*others, "model"):
            label = {"parent": "before", "model": "after" if others else "answer"}.get(name, name)
            console.print(f"[dim]{escape(label):<9}[/]  {escape(sample[name])}")


def _scores_table(title: str, results: dict[str, Any], others: list[str]) -> Table:
    """Each metric of the model, of each other model, and the difference; intervals of 95 % are dim."""
    columns = ["metric", "model"]
    for name in others:
        columns += [name, "difference"] if name in results["differences"] else [name]
    rows = []
    for metric, value in results["model"].items():
        fewer = results.get("scored", {}).get(metric)
        row = [
            escape(metric) + (f" [dim]of {fewer:,}[/]" if fewer else ""),
            _with_interval(value, results["intervals"].get("model", {}).get(metric)),
        ]
        for name in others:
            theirs = results[name].get(metric)
            row.append("" if theirs is None else _with_interval(theirs, results["intervals"].get(name, {}).get(metric)))
            if name in results["differences"]:
                row.append(_difference(metric, results["differences"][name].get(metric)))
        rows.append(row)
    return _marked_table(title, columns, rows)


def _with_interval(value: float, interval: list[float] | None) -> str:
    return _figure(value) + (f" [dim]{_figure(interval[0])} to {_figure(interval[1])}[/]" if interval else "")


def _difference(metric: str, found: dict[str, Any] | None) -> str:
    """With its interval; coloured where the report calls it better or worse."""
    from llmkit.report.verdict import judged

    if found is None:
        return ""
    text = _figure(found["difference"], sign=True)
    p = found["p"]
    if colour := _COLOURS.get(judged(metric, found["difference"], found["low"], found["high"], p)):
        text = f"[{colour}]{text}[/]"
    if found["low"] is not None and found["low"] != found["high"]:
        text += f" [dim]{_figure(found['low'], sign=True)} to {_figure(found['high'], sign=True)}[/]"
    return text if p is None else f"{text} [dim]p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}[/]"


def _figure(value: float, *, sign: bool = False) -> str:
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:+.3g}" if sign else f"{value:.3g}"
    places = 4 if abs(value) < 10 else 2
    return f"{value:{'+' if sign else ''}.{places}f}"


def _show_reasons(console: Console, results: dict[str, Any]) -> None:
    """Which metrics have no value or interval, and why; those with one reason in one line."""
    said: dict[str, list[str]] = {}
    for reasons in results["reasons"].values():
        for metric, why in reasons.items():
            names = said.setdefault(why, [])
            names += [metric] if metric not in names else []
    for why, names in said.items():
        console.print(f"[dim]{escape(', '.join(names))}: {escape(why)}[/]")


def _show_slices(console: Console, results: dict[str, Any], others: list[str]) -> None:
    """One metric of each part, the one that people look at first."""
    slices = results["slices"]
    metric = _main_metric({name: value for part in slices for name, value in part["model"].items()})
    if metric is None:
        return
    rows = []
    for part in slices:
        count = part.get("scored", {}).get(metric, part["examples"])
        row = [escape(part["by"]), escape(part["value"]), f"{count:,}"]
        for who in ("model", *others):
            value, interval = part[who].get(metric), part["intervals"].get(who, {}).get(metric)
            row.append("" if value is None else _with_interval(value, interval))
        rows.append(row)
    console.print()
    console.print(_marked_table(f"{metric} by slice", ["by", "value", "examples", "model", *others], rows))


def _show_data_sets(console: Console, results: dict[str, Any]) -> None:
    """The gaps between data sets, of the metric that people look at first and of the loss."""
    metrics = {"loss", _main_metric(results["model"])}
    gaps = [gap for gap in results["gaps"] if gap["metric"] in metrics]
    if not gaps:
        return
    rows = []
    for gap in gaps:
        interval = [gap["low"], gap["high"]] if gap.get("low") is not None else None
        spread = f" [dim]{_figure(interval[0], sign=True)} to {_figure(interval[1], sign=True)}[/]" if interval else ""
        row = [f"{gap['kind']}: {gap['from']} to {gap['to']}", gap["who"], gap["metric"]]
        values = [_figure(gap["from_value"]), _figure(gap["to_value"]), _figure(gap["gap"], sign=True) + spread]
        rows.append([*map(escape, row), *values])
    console.print()
    console.print(_marked_table("gaps between data sets", ["gap", "of", "metric", "from", "to", "difference"], rows))


def _main_metric(values: dict[str, float]) -> str | None:
    return next((name for name in ("accuracy", "rmse", "rougeL", "bits_per_byte", "loss") if name in values), None)


def _marked_table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose cells may hold marks."""
    table = make_table(title, columns, [])
    for row in rows:
        table.add_row(*row)
    return table


def _without_common_parts(prompts: list[str], longest: int = 600) -> list[str]:
    """Prompts without the lines that all of them begin and end with: the template, the instruction."""
    split = [prompt.split("\n") for prompt in prompts]
    fewest = min(map(len, split), default=0)
    same = [len({lines[number] for lines in split}) == 1 for number in range(fewest)]
    same_from_end = [len({lines[-1 - number] for lines in split}) == 1 for number in range(fewest)]
    start = next((n for n, equal in enumerate(same) if not equal), 0)
    end = next((n for n, equal in enumerate(same_from_end) if not equal), 0)
    texts = ["\n           ".join(lines[start : len(lines) - end]) for lines in split]
    return [text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}" for text in texts]


def show_next(console: Console, run: Run, recipe: Recipe) -> None:
    """What to type next."""
    commands = []
    if recipe.task not in ("classify", "regress"):
        raw = "" if recipe.task == "chat" else " --raw"
        commands.append(f'llmkit generate {run.path} "your prompt"{raw}')
    commands.append(f"llmkit run {run.path}     runs only what a change of the recipe or the data touches")
    for number, command in enumerate(commands):
        console.print(f"{'' if number else 'next':<6}{escape(command)}")


def _readable(key: str, value: Any) -> str:
    """A metric with its unit."""
    if key.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if key.endswith("_per_second"):
        return f"{value:,.0f}"
    if key.endswith("seconds"):
        return f"{value:,.1f} s"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
