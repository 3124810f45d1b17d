"""`llmkit report`, and the page that every command leaves in its run."""

from __future__ import annotations

import time
from pathlib import Path

from llmkit.cli.console import standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.errors import LlmkitError
from llmkit.run.directory import Run
from llmkit.run.reporter import Reporter


def report_command(run: Path, file: Path | None, *, as_json: bool) -> None:
    """Writes the page of a run and says where."""
    started = time.monotonic()
    with errors_shown(as_json=as_json):
        from llmkit.report.page import write_report

        written = write_report(run, file)
        if as_json:
            print_json(
                {
                    "status": "done",
                    "command": "report",
                    "run_dir": str(run),
                    "seconds": round(time.monotonic() - started, 2),
                    "metrics": {},
                    "artifacts": {"report": str(written)},
                }
            )
            return
        standard_output().print(str(written), markup=False)


def leave_report(run: Run, *, lead: bool) -> None:
    """Writes the page into a run after a command, in its first process."""
    if lead:
        leave_page(run.path, run.reporter)


def leave_page(folder: Path, reporter: Reporter) -> None:
    """Writes the page of a folder; what goes wrong with it is told, and takes nothing from the command."""
    from llmkit.report.page import write_report

    try:
        write_report(folder)
    except LlmkitError as error:
        told = ": ".join(filter(None, (error.what, error.where or error.got)))
        reporter.warn(f"no new report.html: {told} (`llmkit report {folder}` tries again)")
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        reporter.warn(f"no new report.html, for a bug: {told} (`llmkit report {folder}` keeps the traceback)")
