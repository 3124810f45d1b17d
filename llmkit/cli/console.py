"""Progress, notes and tables on standard error, drawn by Rich on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from llmkit.run.reporter import Progress as ProgressProtocol
from llmkit.run.reporter import SilentProgress

_MARKS = {"running": "[cyan]●[/]", "resumed": "[cyan]●[/]", "done": "[green]✓[/]", "unchanged": "[green]=[/]"}
_SECONDS_BETWEEN_LINES = 15.0


class ConsoleReporter:
    """Tells a person on standard error what happens."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def stage(self, name: str, state: str, why: str) -> None:
        """One line for each change of a stage's state."""
        self._line(f"{_MARKS[state]} [bold]{name}[/] {state}: {escape(why)}")

    def note(self, text: str) -> None:
        """An indented line."""
        self._line(f"  {escape(text)}")

    def warn(self, text: str) -> None:
        """An indented line that stands out."""
        self._line(f"  [yellow]warning:[/] {escape(text)}")

    def guess(self, key: str, value: str, source: str) -> None:
        """The key, the value that was chosen and why."""
        self._line(f"  {escape(key)} = [bold]{escape(value)}[/] [dim]({escape(source)})[/]")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table with its title above."""
        self.console.print(make_table(title, columns, rows))

    def progress(self, title: str, total: int, unit: str) -> ProgressProtocol:
        """A bar on a terminal, else a line now and then."""
        if self.console.is_terminal:
            return _Bar(self.console, title, total)
        return _Lines(self.console, title, total, unit)

    def _line(self, markup: str) -> None:
        self.console.print(markup, soft_wrap=True, highlight=False)


def standard_error() -> Console:
    """The console for what happens; wide where nothing says how wide it is, so that a log keeps its lines whole."""
    console = Console(emoji=False, stderr=True)
    return console if console.is_terminal else Console(emoji=False, stderr=True, width=160)


def standard_output() -> Console:
    """The console for results."""
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(emoji=False, highlight=False, soft_wrap=True, width=160)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Rows as a Rich table; numbers stand to the right."""
    table = Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2),
        show_header=any(columns),
    )
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows if row[number] not in ("", None)]
        right = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        table.add_column(column, justify="right" if right else "left", overflow="fold", header_style="dim")
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


class _Fields(ProgressColumn):
    """The short texts beside a bar."""

    def render(self, task: Task) -> Text:
        """All that is not empty, in the order given."""
        return Text("  ".join(value for value in task.fields.values() if value), style="cyan")


class _Bar:
    """A Rich progress bar; it goes away when the work has ended."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            _Fields(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task(title, total=total or None)
        self._progress.start()

    def advance(self, done: int = 1, **fields: str) -> None:
        """Moves the bar."""
        self._progress.update(self._task, advance=done, **fields)  # type: ignore[arg-type]

    def close(self) -> None:
        """Takes the bar away."""
        self._progress.stop()


class _Lines(SilentProgress):
    """One line every quarter of a minute, for logs."""

    def __init__(self, console: Console, title: str, total: int, unit: str) -> None:
        self._console, self._title, self._total, self._unit = console, title, total, unit
        self._done = 0
        self._last = time.monotonic()

    def advance(self, done: int = 1, **fields: str) -> None:
        """Writes a line when the last one is old."""
        self._done += done
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        shown = "  ".join(value for value in fields.values() if value)
        of = f"/{self._total:,}" if self._total else ""
        self._console.print(
            escape(f"  {self._title} {self._done:,}{of} {self._unit}  {shown}"), highlight=False, soft_wrap=True
        )
