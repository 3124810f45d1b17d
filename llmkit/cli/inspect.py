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

_SHADES = ("bold black on green", "bold black on bright_green")  # neighbours differ, so that token borders are seen


def inspect_command(flags: Flags, *, examples: int, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Shows how rows were understood, a few examples token by token, and counts."""
    with errors_shown(as_json=as_json):
        reporter = make_reporter(quiet=quiet)
        recipe = recipe_from(flags, "inspect", reporter)
        quieten_libraries(verbose=verbose)
        from llmkit.run.directory import Run
        from llmkit.stages.inspection import PERCENTILES, inspect_data

        found = inspect_data(recipe, Run(Path(), {"stages": {}, "guesses": {}}, reporter, None), examples)
        if as_json:
            rejected = [{"where": str(r.where), "reason": r.reason} for r in found.unusable]
            fields = {name: getattr(found, name) for name in ("task", "formats", "facts", "counts")}
            fields["percentiles"] = {
                name: dict(zip(map(str, PERCENTILES), values, strict=True))
                for name, values in found.percentiles.items()
                if values
            }
            shown = [asdict(example) for example in found.examples]
            print_json({"status": "done", "command": "inspect"} | fields | {"unusable": rejected, "examples": shown})
            return
        console = standard_output()
        _show_understanding(console, found)
        for example in found.examples:
            _show_example(console, example)
        console.print(make_table("\ncounts", ("", ""), list(found.counts.items())))
        columns = ("length", *(f"{p}%" for p in PERCENTILES))
        rows = [(name, *values) for name, values in found.percentiles.items() if values]
        console.print(make_table("\npercentiles", columns, rows))
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
