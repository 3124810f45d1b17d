"""`llmkit crossval` and `llmkit evaluate --learning-curve`: several runs of one recipe, one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from llmkit.cli.console import make_table, standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.cli.recipes import Flags, recipe_from, run_directory
from llmkit.cli.report import leave_page
from llmkit.cli.stages import StageCommand, make_reporter, open_run
from llmkit.errors import StoppedError, UsageError
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import seconds_of
from llmkit.run.directory import Run
from llmkit.run.reporter import SilentReporter

if TYPE_CHECKING:
    from llmkit.stages.crossval import CrossValidation


@dataclass(frozen=True)
class _OneOfSeveral(StageCommand):
    """A command whose result is shown with others'."""

    foreseen: dict[str, Any] = field(default_factory=dict)  # by run directory, what a dry run found

    def _show(self, recipe: Recipe, run: Run, names: list[str], seconds: float, *, leaks: bool) -> None:
        return

    def _dry_run(self, recipe: Recipe, path: Path) -> None:
        if not self.as_json:
            super()._dry_run(recipe, path)
            return
        from llmkit.stages.pipeline import decide_all

        run = Run.peek(path, recipe.name)
        decisions = decide_all(recipe, run, self._target, resume=self.resume, anyway=self.anyway)
        self.foreseen[str(path)] = {d.stage: {"runs": d.runs, "why": d.why} for d in decisions}


@dataclass(frozen=True)
class SeveralRuns:
    """What was typed for a command that makes several runs."""

    flags: Flags
    resume: bool
    anyway: bool
    as_json: bool
    quiet: bool
    verbose: bool
    foreseen: dict[str, Any] = field(default_factory=dict)

    def crossval(self, folds: int, *, dry_run: bool) -> None:
        """Trains and scores each fold, and shows what all of them say. Exits as `llmkit run` does."""
        started = time.monotonic()
        with self._errors_shown():
            _refuse_settings(self.flags, "data.fold", "crossval")
            recipe = recipe_from(self.flags, "run", SilentReporter())
            from llmkit.stages.crossval import CROSSVAL, CrossValidation

            folder = self.flags.out or Path("runs") / f"{recipe.name}-crossval"
            whole = CrossValidation(recipe, folds, folder)
            whole.check()
            if self._lead and not dry_run:
                whole.begin()
        for fold in range(1, folds + 1):
            if not dry_run:
                self._say(f"fold {fold} of {folds}", whole.run_of(fold))
            if fold > 1 and "pretrain" in recipe.plan and not dry_run:
                self._take_over_pretraining(whole, fold, started)
            self._run("run", whole.run_of(fold), whole.settings(fold), recipe, started, dry_run=dry_run)
            if self._lead and not dry_run:
                with self._errors_shown():
                    found = whole.write(fold)
                leave_page(folder, make_reporter(quiet=self.quiet))
        if dry_run:
            self._show_foreseen("crossval", folder)
        elif self._lead:
            self._show("crossval", folder, found, {"crossval": folder / CROSSVAL}, started, show_folds)

    def learning_curve(self, text: str, *, dry_run: bool) -> None:
        """Scores the run, trains on shares of its data, and shows the scores by share. Exits as `llmkit run` does."""
        started = time.monotonic()
        with self._errors_shown():
            from llmkit.stages.crossval import CURVE, LearningCurve, shares_of

            shares = shares_of(text)
            _refuse_settings(self.flags, "data.train_share", "--learning-curve")
            recipe = recipe_from(self.flags, "evaluate", SilentReporter())
            curve = LearningCurve(recipe, shares, run_directory(self.flags, recipe))
            curve.check()
        self._run("evaluate", curve.run, (), recipe, started, dry_run=dry_run)
        for part in curve.smaller:
            if not dry_run:
                self._say(f"{part} of the training rows", curve.run_of(part))
            self._run("run", curve.run_of(part), curve.settings(part), recipe, started, dry_run=dry_run)
        if dry_run:
            self._show_foreseen("evaluate", curve.run)
        elif self._lead:
            with self._errors_shown():
                found = curve.write()
            leave_page(curve.run, make_reporter(quiet=self.quiet))
            self._show("evaluate", curve.run, found, {"learning_curve": curve.run / CURVE}, started, show_curve)

    def _take_over_pretraining(self, whole: CrossValidation, fold: int, started: float) -> None:
        """Pretraining on data of its own is the same in every fold, and done once."""
        from llmkit.stages.crossval import take_over

        path, donor, settings = whole.run_of(fold), whole.run_of(1), whole.settings(fold)
        self._run("preprocess", path, settings, whole.recipe, started, dry_run=False)
        if not self._lead:
            return
        with self._errors_shown():
            mine = recipe_from(self._flags(path, settings), "run", SilentReporter())
            run = open_run(path, mine, make_reporter(quiet=self.quiet), lead=True)
            try:
                if take_over("pretrain", mine, run, donor):
                    run.reporter.stage("pretrain", "unchanged", f"done on the same inputs in {donor}")
            finally:
                run.close()

    def _flags(self, out: Path, settings: tuple[str, ...]) -> Flags:
        return replace(self.flags, out=out, set_=(*self.flags.set_, *settings))

    @property
    def _lead(self) -> bool:
        return int(os.environ.get("RANK", "0")) == 0

    @contextmanager
    def _errors_shown(self) -> Iterator[None]:
        with errors_shown(as_json=self.as_json and self._lead):
            yield

    def _say(self, what: str, run: Path) -> None:
        if self._lead:
            make_reporter(quiet=self.quiet).stage(what, "running", str(run))

    def _run(
        self, name: str, out: Path, settings: tuple[str, ...], recipe: Recipe, started: float, *, dry_run: bool
    ) -> None:
        """One of the runs; its error, if it has one, ends the whole command."""
        left = None
        if recipe.max_time is not None:
            left = seconds_of(recipe.max_time) - (time.monotonic() - started)
            with self._errors_shown():
                if left <= 0:
                    hint = "run the same command again to go on from there"
                    raise StoppedError("the time of max_time is over", hint=hint)
        flags = self._flags(out, settings)
        if left is not None:
            flags = replace(flags, max_time=f"{left:.0f}s", set_=_without(flags.set_, "max_time"))
        command = _OneOfSeveral(
            *(name, flags, self.resume, self.anyway),
            as_json=self.as_json,
            quiet=self.quiet,
            verbose=self.verbose,
            foreseen=self.foreseen,
        )
        command.execute(dry_run=dry_run)

    def _show_foreseen(self, command: str, folder: Path) -> None:
        if self.as_json:
            print_json({"status": "dry run", "command": command, "run_dir": str(folder), "runs": self.foreseen})

    def _show(
        self,
        command: str,
        folder: Path,
        found: dict[str, Any],
        artifacts: dict[str, Path],
        started: float,
        show: Callable[[Console, dict[str, Any]], None],
    ) -> None:
        seconds = time.monotonic() - started
        if self.as_json:
            said = {"status": "done", "command": command, "run_dir": str(folder), "seconds": round(seconds, 2)}
            print_json(said | {"metrics": found, "artifacts": {name: str(path) for name, path in artifacts.items()}})
            return
        console = standard_output()
        show(console, found)
        console.print(f"\nwritten to {', '.join(map(str, artifacts.values()))}   ({seconds:.0f} s)")


def show_folds(console: Console, found: dict[str, Any]) -> None:
    """Each fold's scores, then mean, spread and interval; below it how the model differs from the others."""
    from llmkit.report.folds import lacking, without_interval

    scores = found["scores"]["model"]
    columns = ("metric", *(f"fold {run['fold']}" for run in found["runs"]), "mean", "std", "95 % of the mean")
    rows = [[metric, *map(_number, each["values"]), *_summary(each)] for metric, each in scores.items()]
    examples = ", ".join(f"{run['examples']:,}" for run in found["runs"])
    console.print()
    console.print(make_table(f"{found['name']}: {found['folds']} folds of {examples} examples", columns, rows))
    _show_left_out(console, found, scores)
    for (metric, why), folds in lacking(found).items():
        console.print(f"[dim]{escape(metric)}: fold {', '.join(map(str, folds))}: {escape(why)}[/]")
    for who, differences in found.get("differences", {}).items():
        rows = [[metric, *_summary(each, sign=True)] for metric, each in differences.items()]
        console.print()
        console.print(make_table(f"model - {who}", ("metric", "mean", "std", "95 % of the mean"), rows))
    for why, metrics in without_interval(found).items():
        console.print(f"[dim]{escape(', '.join(metrics))}: no interval, because {escape(why)}[/]")


def show_curve(console: Console, found: dict[str, Any]) -> None:
    """A line for each metric, a column for each share; below each score its 95 % interval."""
    before = [{"share": "before", "train_examples": 0, **found["before"]}] if "before" in found else []
    points = [*before, *found["points"]]
    rows = [["training examples", *(f"{point['train_examples']:,}" for point in points)]]
    for name in found["points"][-1]["scores"]:
        rows.append([name, *(_with_interval(each["scores"].get(name), each["intervals"].get(name)) for each in points)])
    title = f"{found['name']}: scores over {found['examples']:,} held-out examples, by share of the training rows"
    console.print()
    console.print(make_table(title, ("", *(point["share"] for point in points)), rows))
    _show_left_out(console, found, found["points"][-1]["scores"])


def _show_left_out(console: Console, found: dict[str, Any], scores: dict[str, Any]) -> None:
    """Which metrics are not among the scores, and why."""
    if left_out := found.get("left_out"):
        instead = "; bits_per_byte can be" if "bits_per_byte" in scores else ""
        console.print(f"{', '.join(left_out['metrics'])} cannot be compared: {left_out['why']}{instead}.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _summary(each: dict[str, Any], *, sign: bool = False) -> list[str]:
    plus = "+" if sign else ""
    if each["std"] is None:
        return [f"{each['mean']:{plus}.4f}", "", ""]
    low, high = each["interval"] or (None, None)
    bounds = "" if low is None else f"{low:{plus}.4f} to {high:{plus}.4f}"
    return [f"{each['mean']:{plus}.4f}", f"{each['std']:.4f}", bounds]


def _with_interval(value: float | None, interval: list[float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" + (f"\n{interval[0]:.4f} to {interval[1]:.4f}" if interval else "")


def _refuse_settings(flags: Flags, key: str, what: str) -> None:
    """Raises UsageError for a key that the command itself sets."""
    if given := [text for text in flags.set_ if text.partition("=")[0] == key]:
        raise UsageError(f"{what} sets `{key}` itself", got=f"--set {given[0]}", hint="leave it out")


def _without(settings: tuple[str, ...], key: str) -> tuple[str, ...]:
    return tuple(text for text in settings if text.partition("=")[0] != key)
