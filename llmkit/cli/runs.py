"""`llmkit runs`: what each run is doing, and how to go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from llmkit import catalog
from llmkit.cli.console import ConsoleReporter, make_table, standard_error, standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.errors import UsageError, did_you_mean
from llmkit.run.overview import STATES, Overview, find_runs, read_overview

_PLACE = Path("runs")  # where recipes put their runs
_SORTS: dict[str, tuple[Callable[[Overview], Any], bool]] = {  # the key, and whether the largest comes first
    "active": (lambda run: run.active, True),
    "created": (lambda run: run.created, True),
    "name": (lambda run: (run.name, str(run.path)), False),
    "state": (lambda run: STATES.index(run.state), False),
    "loss": (lambda run: run.loss, False),
    "eval_loss": (lambda run: run.eval_loss, False),
    "step": (lambda run: run.step, True),
}


@dataclass(frozen=True)
class Wanted:
    """Which runs to show, and in which order. Raises UsageError when a state, a task or an order is not known."""

    states: tuple[str, ...] = ()
    task: str | None = None
    model: str | None = None  # a part of its URI
    sort: str = "active"
    reverse: bool = False

    def __post_init__(self) -> None:
        for state in self.states:
            _require_known("--state", state, STATES)
        _require_known("--sort", self.sort, tuple(_SORTS))
        if self.task is not None:
            _require_known("--task", self.task, catalog.names("task"))

    def chosen(self, runs: Sequence[Overview]) -> list[Overview]:
        """Those that pass, in order; a run without what they are ordered by comes last."""
        kept = [run for run in runs if self._passes(run)]
        key, descending = _SORTS[self.sort]
        known = [run for run in kept if key(run) is not None]
        known.sort(key=key, reverse=descending is not self.reverse)
        return known + [run for run in kept if key(run) is None]

    def _passes(self, run: Overview) -> bool:
        of_task = self.task in (None, run.task)
        of_model = self.model is None or self.model.lower() in (run.model or "").lower()
        return of_task and of_model and (not self.states or run.state in self.states)


def runs_command(folders: Sequence[Path], make_wanted: Callable[[], Wanted], *, as_json: bool) -> None:
    """Shows the runs below some folders, or below `runs`."""
    started = time.monotonic()
    with errors_shown(as_json=as_json):
        wanted = make_wanted()
        for folder in folders:
            if not folder.is_dir():
                got = f"{folder} is a file" if folder.exists() else f"{folder} does not exist"
                raise UsageError(
                    "there is no such folder", got=got, expected="a folder of runs, or a run directory", where=folder
                )
        unreadable: list[Path] = []
        places = list(folders) or [place for place in (_PLACE,) if place.is_dir()]
        found = [read_overview(path) for path in find_runs(places, unreadable.append)]
        shown = wanted.chosen(found)
        if as_json:
            head: dict[str, Any] = {"status": "done", "command": "runs", "run_dir": None}
            head |= {"seconds": round(time.monotonic() - started, 2), "metrics": {}, "artifacts": {}}
            fields = {"unreadable": [str(path) for path in unreadable], "runs": [_as_json(run) for run in shown]}
            print_json(head | fields)
            return
        for path in unreadable:
            ConsoleReporter(standard_error()).warn(f"{plain(str(path))} cannot be read")
        _show(standard_output(), shown, len(found), folders or [_PLACE])


def _require_known(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        expected = "one of " + ", ".join(known)
        raise UsageError(f"{flag} {value} is not known", expected=expected, hint=did_you_mean(value, known), where=flag)


def _as_json(run: Overview) -> dict[str, Any]:
    when = None if run.active is None else datetime.fromtimestamp(run.active, UTC).isoformat(timespec="seconds")
    return {**asdict(run), "path": str(run.path).encode(errors="replace").decode(), "active": when}


def _show(console: Console, runs: Sequence[Overview], found: int, places: Sequence[Path]) -> None:
    """A table, then the command lines that go on."""
    if not runs:
        below = " ".join(map(str, places))
        why = f"none of {found} runs passes" if found else f"there is no run below {below}"
        hint = "" if found else "; `llmkit runs DIR` looks elsewhere"
        console.print(escape(plain(why + hint)))
        return
    columns = ["run", "state", "stage", "step", "loss", "held out", "active", "process"]
    rows = [_row(run) for run in runs]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    console.print(make_table(f"{len(runs)} of {found} runs", columns, rows))
    commands = [run for run in runs if run.next is not None]
    if commands:
        console.print("\n[bold]to go on[/]")
    for run in commands:
        console.print(f"  {escape(plain(run.next or ''))}[dim]{escape(_remark(run))}[/]", soft_wrap=True)
    for run in runs:
        if run.event is not None and run.state != "done":
            console.print(f"[yellow]{escape(plain(f'{run.path}: {run.event}'))}[/]", soft_wrap=True)


def _row(run: Overview) -> tuple[Any, ...]:
    path = str(run.path)
    name = path if run.path.name == run.name else f"{path} ({run.name})"
    state = f"{run.state}: {run.why}" if run.why else run.state
    of = "" if run.total_steps is None else f"/{run.total_steps:,}"
    return (
        plain(name),
        plain(state),
        run.stage or "",
        "" if run.step is None else f"{run.step:,}{of}",
        run.loss,
        run.eval_loss,
        _ago(run.active),
        plain(f"{run.pid} on {run.host}") if run.state in ("alive", "crashed") and run.pid is not None else "",
    )


def _remark(run: Overview) -> str:
    """What the command line beside it will do, or what to do before."""
    if run.state == "failed":
        bug = f"   the traceback is in {run.path / 'error.log'}"
        return plain(bug) if run.why == "bug" else "   shows the error again, or goes on when its cause is mended"
    if run.state in ("stopped", "crashed", "diverged"):
        start = f"   from step {run.checkpoint:,}" if run.checkpoint is not None else f"   {run.stage} from its start"
        again = "; --no-resume in place of --resume-anyway starts all over" if run.state == "diverged" else ""
        return start + again
    return {"damaged": "   names what is damaged"}.get(run.state, f"   {run.stage} is next")


def _ago(active: float | None) -> str:
    """How long ago, in the unit that suits it; a clock that was set back makes nothing negative."""
    if active is None:
        return ""
    seconds = max(0.0, time.time() - active)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def plain(text: str) -> str:
    """Text without what would steer a terminal: names on disk may hold anything."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
