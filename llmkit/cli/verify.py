"""`llmkit verify`: every checksum of a run, as a table; damage is an error that names each file."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.markup import escape

from llmkit.cli.console import ConsoleReporter, make_table, standard_error, standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.cli.runs import plain
from llmkit.errors import ArtifactError, Problem
from llmkit.run.findings import Verification
from llmkit.run.reporter import Progress, Reporter, SilentReporter
from llmkit.run.verify import verify_run

_MB = 10**6


def verify_command(run: Path, *, as_json: bool, quiet: bool) -> None:
    """Checks a run. Exits with 4 when something in it is damaged."""
    started = time.monotonic()
    reporter: Reporter = SilentReporter() if quiet else ConsoleReporter(standard_error())
    with errors_shown(as_json=as_json):
        shown = _Shown(reporter)
        try:
            found = verify_run(run, shown.begin)
        finally:
            shown.close()
        for note in found.notes:
            reporter.note(plain(note))
        if not as_json:
            _show(run, found)
        if found.problems:
            raise _damage(found)
        if as_json:
            checks = [
                {
                    "what": c.what,
                    "files": c.files,
                    "bytes": c.nbytes,
                    "by_size_only": c.by_size_only,
                    "verdict": c.verdict,
                }
                for c in found.checks
            ]
            totals = {"files": found.files, "bytes": found.nbytes}
            head = {"status": "done", "command": "verify", "run_dir": str(run)}
            rest = {"seconds": round(time.monotonic() - started, 2), "metrics": totals, "artifacts": {}}
            print_json({**head, **rest, "checks": checks, "notes": found.notes})


class _Shown:
    """Progress in megabytes, of reads of any size from any thread."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._progress: Progress | None = None
        self._lock = threading.Lock()
        self._read = self._told = 0

    def begin(self, nbytes: int) -> Callable[[int], None]:
        """Starts to show that so many bytes are read."""
        if nbytes:
            self._progress = self._reporter.progress("checking", -(-nbytes // _MB), "MB")
        return self._advance

    def close(self) -> None:
        """Shows it no more."""
        if self._progress is not None:
            self._progress.close()

    def _advance(self, done: int) -> None:
        with self._lock:
            self._read += done
            whole, self._told = self._read // _MB - self._told, self._read // _MB
            if self._progress is not None and whole:
                self._progress.advance(whole)


def _show(run: Path, found: Verification) -> None:
    rows = [(plain(check.what), check.files, check.nbytes, check.verdict) for check in found.checks]
    standard_output().print(make_table(escape(plain(str(run))), ("what", "files", "bytes", "verdict"), rows))


def _damage(found: Verification) -> ArtifactError:
    """One error for all that is damaged."""
    problems = [_printable(problem) for problem in found.problems]
    if len(problems) == 1:
        return ArtifactError(problems[0].what, **{k: v for k, v in vars(problems[0]).items() if k != "what"})
    return ArtifactError(
        f"{len(problems)} things in the run are damaged",
        hint="each is named with what to do about it",
        problems=problems,
    )


def _printable(problem: Problem) -> Problem:
    return replace(problem, **{key: plain(value) for key, value in vars(problem).items() if value is not None})
