"""`llmkit inspect`: what the model will see, drawn on a terminal."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from llmkit.cli.console import make_table, standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.cli.recipes import Flags, recipe_from
from llmkit.cli.stages import make_reporter, quieten_libraries
from llmkit.cli.statistics import (
    STATISTICS,
    show_corpora,
    show_counts,
    show_difference,
    show_filters,
    show_leaks,
    statistics_of,
)
from llmkit.errors import UsageError

_SHADES = ("bold black on green", "bold black on bright_green")  # neighbours differ, so that token borders are seen


def inspect_command(
    flags: Flags, *, examples: int, dropped: int, diff: Path | None, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Shows how rows were understood, or what a run has made of them; with `diff`, two runs side by side."""
    with errors_shown(as_json=as_json):
        made = flags.recipe if flags.recipe is not None and (flags.recipe / STATISTICS).is_file() else None
        if diff is not None:
            _show_diff(flags.recipe, diff, examples, as_json=as_json)
            return
        if made is not None and not flags.set_:
            quieten_libraries(verbose=verbose)
            _show_run(made, examples, dropped, as_json=as_json)
            return
        reporter = make_reporter(quiet=quiet)
        recipe = recipe_from(flags, "inspect", reporter)
        quieten_libraries(verbose=verbose)
        from llmkit.run.directory import Run
        from llmkit.stages.inspection import inspect_data

        found = inspect_data(recipe, Run(Path(), {"stages": {}, "guesses": {}}, reporter, None), examples)
        if as_json:
            print_json({"status": "done", "command": "inspect"} | _as_json(found))
            return
        _show(standard_output(), found, dropped)


def _show_diff(first: Path | None, second: Path, examples: int, *, as_json: bool) -> None:
    if first is None:
        raise UsageError("--diff compares two runs", expected="`llmkit inspect RUN --diff OTHER_RUN`")
    console = Console(emoji=False, quiet=True) if as_json else standard_output()
    found = show_difference(console, first, second, examples)
    if as_json:
        print_json({"status": "done", "command": "inspect", "runs": [str(first), str(second)], "examples": found})


def _show_run(run: Path, examples: int, dropped: int, *, as_json: bool) -> None:
    """What preprocess left: nothing is read again."""
    from llmkit.stages.inspection import shown_examples

    statistics, shown = statistics_of(run), shown_examples(run, examples)
    if as_json:
        fields = {"statistics": statistics, "examples": [asdict(example) for example in shown]}
        print_json({"status": "done", "command": "inspect", "run_dir": str(run)} | fields)
        return
    console = standard_output()
    for example in shown:
        _show_example(console, example)
    show_corpora(console, statistics)
    show_counts(console, "rows that cannot be used", statistics["rejected"])
    show_filters(console, statistics["filters"], dropped)
    show_leaks(console, statistics["leaks"], dropped)


def _as_json(found: Any) -> dict[str, Any]:
    from llmkit.stages.inspection import PERCENTILES

    rejected = [{"where": str(r.where), "reason": r.reason} for r in found.unusable]
    fields = {name: getattr(found, name) for name in ("task", "formats", "facts", "counts", "filters")}
    fields["percentiles"] = {
        name: dict(zip(map(str, PERCENTILES), values, strict=True))
        for name, values in found.percentiles.items()
        if values
    }
    return fields | {"unusable": rejected, "examples": [asdict(example) for example in found.examples]}


def _show(console: Console, found: Any, dropped: int) -> None:
    from llmkit.stages.inspection import PERCENTILES

    _show_understanding(console, found)
    for example in found.examples:
        _show_example(console, example)
    console.print(make_table("\ncounts", ("", ""), list(found.counts.items())))
    columns = ("length", *(f"{p}%" for p in PERCENTILES))
    rows = [(name, *values) for name, values in found.percentiles.items() if values]
    console.print(make_table("\npercentiles", columns, rows))
    show_filters(console, found.filters, dropped)
    if found.unusable:
        rows = [(str(r.where), r.reason) for r in found.unusable[:10]]
        console.print(make_table(f"\nrows that cannot be used ({len(found.unusable)})", ("where", "why"), rows))


def _show_understanding(console: Console, found: Any) -> None:
    console.print(f"[bold]task[/]       {found.task}")
    for uri, understood in found.formats.items():
        console.print(f"[bold]rows[/]       {escape(uri)}: {escape(understood)}")
    for key, value in found.facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value).strip("\n")
        console.print(f"[bold]{escape(key.replace('_', ' ')):<10}[/] ", end="")
        console.print(escape(text), soft_wrap=True)


def _show_example(console: Console, example: Any) -> None:
    """Every token; supervised ones stand on green, or between « and » where there is no colour."""
    console.print(f"\n[bold]example[/]    {escape(example.where)}: {len(example.ids)} tokens", end="")
    if example.label is not None:
        console.print(f", label [green]{escape(example.label)}[/]", end="")
    if example.supervised is not None:
        console.print(f", {sum(example.supervised)} supervised", end="")
    console.print()
    marks = example.supervised or [False] * len(example.ids)
    coloured = console.is_terminal and not console.no_color
    line = Text()
    for number, (token, supervised) in enumerate(zip(example.tokens, marks, strict=True)):
        visible = token.replace("\n", "⏎\n").replace("\t", "→")
        if coloured:
            line.append(visible, style=_SHADES[number % 2] if supervised else ("dim", "")[number % 2])
        else:
            line.append(f"«{visible}»" if supervised else visible)
    console.print(line, soft_wrap=True)
