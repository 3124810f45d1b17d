"""The commands that run stages, and how their results look."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmkit.cli.benchmarks import show_benchmarks
from llmkit.cli.console import ConsoleReporter, make_table, standard_error, standard_output
from llmkit.cli.output import errors_shown, print_json, prints_aside
from llmkit.cli.recipes import Flags, recipe_from, run_directory
from llmkit.cli.report import leave_report
from llmkit.cli.results import show_metrics, show_next, show_results
from llmkit.cli.statistics import show_leaks, statistics_of
from llmkit.errors import DivergedError, InterruptedByUserError
from llmkit.files import read_json
from llmkit.recipe.load import dump_recipe
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import seconds_of
from llmkit.run.directory import Run
from llmkit.run.reporter import Reporter, SilentReporter

_ARTIFACTS = {
    "preprocess": ("corpus", "preprocess"),
    "pretrain": ("model", "pretrain/model"),
    "freeze": ("freeze_plan", "freeze/freeze.json"),
    "finetune": ("model", "finetune/model"),
    "evaluate": ("results", "evaluate/results.json"),
    "export": ("export", "export"),
}


@dataclass(frozen=True)
class StageCommand:
    """`llmkit run` or one stage of it."""

    name: str
    flags: Flags
    resume: bool
    anyway: bool
    as_json: bool
    quiet: bool
    verbose: bool

    def execute(self, *, dry_run: bool, leaks: bool = False) -> None:
        """Runs the command and prints its result, with `leaks` also what was held out and learnt. Exits with its code."""
        started = time.monotonic()
        lead = int(os.environ.get("RANK", "0")) == 0
        reporter = make_reporter(quiet=self.quiet or not lead)
        with errors_shown(as_json=self.as_json and lead):
            recipe = recipe_from(self.flags, self.name, reporter)
            path = run_directory(self.flags, recipe)
        with errors_shown(as_json=self.as_json and lead, run_dir=path):
            quieten_libraries(verbose=self.verbose)
            with prints_aside():
                from llmkit.stages.pipeline import run_stages, stages_for
                from llmkit.stages.preflight import check_recipe

                check_recipe(recipe, stages_for(recipe, self._target), path)
            if dry_run:
                self._dry_run(recipe, path)
                return
            run = open_run(path, recipe, reporter, lead=lead)
            try:
                if recipe.max_time is not None:
                    run.deadline = started + seconds_of(recipe.max_time)
                launch = self._launcher(recipe, run)
                with prints_aside():
                    made = run_stages(recipe, run, self._target, resume=self.resume, anyway=self.anyway, launch=launch)
                names = [name for name in stages_for(recipe, self._target) if run.is_done(name)]
                if any(decision.runs for decision in made) or not (path / "report.html").exists():
                    leave_report(run, lead=lead)
            except (DivergedError, InterruptedByUserError):  # one that has to stop in time has none for a page
                leave_report(run, lead=lead)
                raise
            finally:
                run.close()
            if lead:
                self._show(recipe, run, names, time.monotonic() - started, leaks=leaks)

    def _launcher(self, recipe: Recipe, run: Run) -> Callable[[str], None] | None:
        """What runs a stage that trains in several processes; None where one is enough."""
        from llmkit.launch.local import Launcher, processes_for

        count = processes_for(recipe)
        if count == 1:
            return None
        same = [flag for flag, on in (("-q", self.quiet), ("-v", self.verbose)) if on]

        def launch(stage: str) -> None:
            mine = self._target in (None, stage)
            how = [
                flag for flag, on in (("--no-resume", not self.resume), ("--resume-anyway", self.anyway)) if on and mine
            ]
            left = [] if run.deadline is None else ["--max-time", f"{run.deadline - time.monotonic():.0f}s"]
            Launcher(count, recipe.launch.hang_after, run.folder(stage)).run([stage, str(run.path), *same, *how, *left])

        return launch

    @property
    def _target(self) -> str | None:
        return None if self.name == "run" else self.name

    def _dry_run(self, recipe: Recipe, path: Path) -> None:
        from llmkit.stages.pipeline import decide_all

        run = Run.peek(path, recipe.name)
        decisions = decide_all(recipe, run, self._target, resume=self.resume, anyway=self.anyway)
        if self.as_json:
            stages = {d.stage: {"runs": d.runs, "why": d.why} for d in decisions}
            print_json({"status": "dry run", "command": self.name, "run_dir": str(path), "stages": stages})
            return
        rows = [(d.stage, "runs" if d.runs else "is skipped", d.why) for d in decisions]
        standard_output().print(make_table(f"{recipe.name} in {path}", ("stage", "", "why"), rows))

    def _show(self, recipe: Recipe, run: Run, names: list[str], seconds: float, *, leaks: bool) -> None:
        """The result: what was made, scores, sample answers, what to do next."""
        metrics = {name: run.stage(name)["metrics"] for name in names}
        artifacts = {key: str(run.path / place) for key, place in (_ARTIFACTS[name] for name in names)}
        artifacts["report"] = str(run.path / "report.html")
        found = statistics_of(run.path)["leaks"] if leaks else None
        if self.as_json:
            own = metrics if self._target is None else metrics.get(self._target, {})
            print_json(
                {
                    "status": "done",
                    "command": self.name,
                    "run_dir": str(run.path),
                    "seconds": round(seconds, 2),
                    "metrics": own,
                    "artifacts": artifacts,
                }
                | ({"leaks": found} if leaks else {})
            )
            return
        console = standard_output()
        if "evaluate" in names and self.name in ("run", "evaluate"):
            results = read_json(run.path / "evaluate" / "results.json")
            show_results(console, results)
            show_benchmarks(console, results)
        elif self._target in metrics:
            show_metrics(console, self.name, metrics[self._target])
        if found is not None:
            show_leaks(console, found, shown=5)
        console.print(f"\nrun   {run.path}   ({seconds:.0f} s), report in {run.path / 'report.html'}")
        if "model" in artifacts or "export" in artifacts:
            show_next(console, run, recipe)


def make_reporter(*, quiet: bool) -> Reporter:
    """The reporter of a command."""
    return SilentReporter() if quiet else ConsoleReporter(standard_error())


def quieten_libraries(*, verbose: bool) -> None:
    """Keeps warnings and progress bars of the libraries off the terminal, unless they are wanted."""
    if verbose:
        return
    import logging
    import warnings

    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)  # it sets its level itself
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("accelerate", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def open_run(path: Path, recipe: Recipe, reporter: Reporter, *, lead: bool) -> Run:
    """Opens the run; all processes but the first only read."""
    return Run.open(path, recipe.name, dump_recipe(recipe), reporter, lead=lead)
