"""`llmkit compare`: runs side by side; a folder of folds is one of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from llmkit.cli.console import make_table, standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.errors import ResourceError
from llmkit.report.comparison import Comparison, compare, comparison_json, sparkline
from llmkit.report.comparison_page import comparison_html, cost_rows, key_rows, loss_rows, score_rows
from llmkit.report.page import write_page


def compare_command(runs: Sequence[Path], html: Path | None, *, as_json: bool) -> None:
    """Shows scores, losses, cost and differing recipe keys of runs; `html` is a file for a page with curves."""
    started = time.monotonic()
    with errors_shown(as_json=as_json):
        found = compare(runs)
        if html is not None:
            _write(html, found)
        if as_json:
            head: dict[str, Any] = {"status": "done", "command": "compare", "run_dir": None}
            head |= {"seconds": round(time.monotonic() - started, 2), "metrics": {}}
            head["artifacts"] = {"page": str(html)} if html is not None else {}
            print_json(head | comparison_json(found))
            return
        console = standard_output()
        for note in found.notes:
            console.print(f"[yellow]note:[/] {escape(note)}")
        _show(console, found)
        if html is not None:
            console.print(f"\npage  {escape(str(html))}")


def _write(html: Path, found: Comparison) -> None:
    try:
        write_page(html, comparison_html(found))
    except ResourceError as error:
        raise ResourceError(error.what, got=error.got, hint="choose another --html", where=html) from None


def _show(console: Console, found: Comparison) -> None:
    if rows := score_rows(found):
        console.print(make_table("\nscores, with 95 % intervals where there are any", ("metric", *found.names), rows))
    if rows := loss_rows(found):
        console.print(make_table("\nlosses", ("", *found.names), rows))
    for stage in found.stages:
        drawn = [
            (name, title, sparkline(curve))
            for name, record in zip(found.names, found.records, strict=True)
            for key, title in (("loss", "training"), ("eval_loss", "held out"))
            if (curve := record.log.curve(stage, key)) is not None and curve.count > 2
        ]
        if drawn:
            console.print(make_table(f"\n{stage}: loss, each from its lowest to its highest", ("", "", ""), drawn))
    console.print(make_table("\ncost", ("", *found.names), cost_rows(found)))
    if rows := key_rows(found):
        console.print(make_table("\nrecipe keys that differ", ("key", *found.names), rows))
    else:
        console.print("\nthe recipes differ in nothing but their names")
