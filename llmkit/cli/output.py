"""How a command ends: its result on standard output, its error on standard error, and the exit code."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from llmkit.errors import InterruptedByUserError, LlmkitError, Problem
from llmkit.files import write_json


def print_json(value: dict[str, Any]) -> None:
    """The one JSON object of a command with --json."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def prints_aside() -> AbstractContextManager[Any]:
    """While entered, what libraries print is no part of a command's result, and goes to standard error."""
    return redirect_stdout(sys.stderr)


@contextmanager
def errors_shown(*, as_json: bool, run_dir: Path | None = None) -> Iterator[None]:
    """Turns what a command raises into a message and an exit code; only a bug of llmkit's own leaves a traceback.

    The traceback goes to `error.log` in the run directory, or in the working folder when there is no run.
    """
    try:
        yield
    except LlmkitError as error:
        show_error(error, as_json=as_json)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        stopped = InterruptedByUserError("stopped by Ctrl-C", hint="run the same command again to go on from there")
        show_error(stopped, as_json=as_json)
        raise typer.Exit(stopped.exit_code) from None
    except BrokenPipeError:
        raise typer.Exit(0) from None
    except Exception as error:
        bug = _bug(error, run_dir)
        show_error(bug, as_json=as_json)
        raise typer.Exit(bug.exit_code) from None


def show_error(error: LlmkitError, *, as_json: bool) -> None:
    """An error for people, for scripts, or for the launcher of several processes, which shows the one that matters."""
    fields = {name: getattr(error, name) for name in ("kind", "what", "got", "expected", "hint", "where", "exit_code")}
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        _write_error_file(Path(file), error, fields)
        return
    if as_json:
        problems = [vars(problem) for problem in error.problems] if len(error.problems) > 1 else []
        print_json({"status": "error"} | fields | ({"problems": problems} if problems else {}))
        return
    console = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    if len(error.problems) > 1:
        console.print(f"[bold red]error:[/] {escape(error.what)}")
    for problem in error.problems:
        _show_problem(console, problem, heading="[bold red]error:[/] " if len(error.problems) == 1 else "- ")


def _write_error_file(path: Path, error: LlmkitError, fields: dict[str, Any]) -> None:
    """As PyTorch's launcher reads it, and the fields of ours beside."""
    said = "\n".join(f"{name}: {value}" for name, value in fields.items() if value is not None)
    about = {"timestamp": str(int(time.time())), "py_callstack": ""}
    message = {"message": said, "errorCode": error.exit_code, "extraInfo": about}
    del fields["exit_code"]
    write_json(path, {"message": message, "llmkit": fields})


def _show_problem(console: Console, problem: Problem, heading: str) -> None:
    """What, then where, got, expected and hint; nothing is said twice."""
    console.print(f"{heading}{escape(problem.what)}")
    for name in ("where", "got", "expected", "hint"):
        value = getattr(problem, name)
        said = name == "got" and (value == problem.where or f"`{value}`" in problem.what)
        if value and not said and not (name == "got" and problem.what.startswith("unknown key")):
            console.print(f"  [dim]{name:<9}[/]{escape(value)}")


def _bug(error: Exception, run_dir: Path | None) -> LlmkitError:
    """Writes the traceback down and says where."""
    folder = run_dir if run_dir is not None and run_dir.is_dir() else Path.cwd()
    path = folder / "error.log"
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        hint = f"the traceback is in {path}; please report it"
    except OSError:
        hint = "".join(traceback.format_exception(error))
    return LlmkitError("llmkit itself is at fault", got=f"{type(error).__name__}: {error}", hint=hint)
