"""`llmkit submit`: a recipe as a job on a cluster, or as several that wait for each other."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from llmkit import catalog
from llmkit.cli.console import standard_error, standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.cli.recipes import Flags, recipe_from, run_directory
from llmkit.cli.stages import make_reporter, quieten_libraries
from llmkit.errors import UsageError, did_you_mean
from llmkit.launch.jobs import (
    Asked,
    entry,
    hand_in,
    jobs_for,
    refuse_no_place,
    refuse_twice,
    waits_for,
    write_jobs,
)
from llmkit.launch.points import Point, points
from llmkit.launch.target import Job, Submitted, Target
from llmkit.recipe.schema import Recipe
from llmkit.run.reporter import Reporter, SilentReporter


def submit_command(
    flags: Flags, ask: Callable[[], Asked], *, only_print: bool, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Writes the scripts of the jobs, hands them in unless only to be printed, and says how to follow them."""
    started = time.monotonic()
    with errors_shown(as_json=as_json):
        asked = ask()
        target = _target(asked.to)
        quieten_libraries(verbose=verbose)
        reporter = make_reporter(quiet=quiet)
        recipe, path, recipes = _recipes(flags, asked, reporter)
        jobs = jobs_for(asked, recipe, path, recipes)
        for job in jobs:
            target.check(job)
        if not only_print:
            refuse_twice(target, path, asked)
        write_jobs(target, jobs, recipes)
        submitted = [] if only_print else hand_in(target, jobs, asked)
        for taken in submitted:
            if taken.in_vain:
                reporter.warn(f"job {taken.id} will not start as things are. {taken.in_vain}")
        if as_json:
            said = [entry(target, job) for job in submitted]
            _print_json("written" if only_print else "submitted", path, started, target, jobs, said)
        elif only_print:
            _print_scripts(target, jobs, asked, quiet=quiet)
        else:
            _show(target, submitted, path)


def _target(name: str) -> Target:
    """The system to hand jobs to. Raises UsageError."""
    known = catalog.names("launch target")
    if name not in known:
        raise UsageError(
            f"unknown launch target `{name}`" if name else "--to is missing",
            got=name or None,
            expected="one of " + ", ".join(known),
            hint=did_you_mean(name, known),
            where="--to",
        )
    made: Target = catalog.resolve("launch target", name)()
    return made


def _recipes(flags: Flags, asked: Asked, reporter: Reporter) -> tuple[Recipe, Path, list[tuple[Point, Recipe]]]:
    """The recipe, where its run is, and the recipe of each job of the array. Raises what wrong recipes raise."""
    recipe = recipe_from(flags, asked.stage, reporter)
    path = run_directory(flags, recipe).resolve()
    if not asked.arrays:
        found = [(Point("recipe", ()), recipe)]
    else:
        found = [(point, _changed(flags, asked, point)) for point in points(asked.arrays)]
    from llmkit.stages.preflight import check_recipe

    for _, one in found:
        check_recipe(one, one.plan)
    refuse_no_place(asked, path, found)
    return recipe, path, found


def _changed(flags: Flags, asked: Asked, point: Point) -> Recipe:
    """The recipe with what one of an array changes in it; what was guessed is told already."""
    settings = tuple(f"{change.key}={json.dumps(change.value)}" for change in point.changes)
    return recipe_from(replace(flags, set_=(*flags.set_, *settings)), asked.stage, SilentReporter())


def _print_json(
    status: str, path: Path, started: float, target: Target, jobs: Sequence[Job], submitted: list[dict[str, str | None]]
) -> None:
    said: dict[str, Any] = {"status": status, "command": "submit", "run_dir": str(path)}
    said |= {"seconds": round(time.monotonic() - started, 2), "metrics": {}, "jobs": submitted}
    print_json(said | {"artifacts": {job.stage: str(target.place(job)) for job in jobs}})


def _print_scripts(target: Target, jobs: Sequence[Job], asked: Asked, *, quiet: bool) -> None:
    """The scripts on standard output; how to hand them in, on standard error."""
    console, names = standard_error(), [job.stage.upper() for job in jobs]
    for number, job in enumerate(jobs):
        sys.stdout.write(target.script(job) + ("\n" if number < len(jobs) - 1 else ""))
        if not quiet:
            words = target.by_hand(job, *waits_for(asked, job, names[:number]))
            console.print(escape(shlex.join(words)), soft_wrap=True, highlight=False)


def _show(target: Target, jobs: Sequence[Submitted], path: Path) -> None:
    console = standard_output()
    for number, job in enumerate(jobs):
        waits = f", after {jobs[number - 1].id}" if number else f", waits for {job.waits_for}" if job.waits_for else ""
        several = f", {len(job.job.works)} runs" if job.job.is_array else ""
        console.print(escape(f"job {job.id}   {job.job.stage}{several}{waits}   {target.place(job.job)}"))
    console.print()
    follow = [*target.to_follow(jobs), (["llmkit", "runs", str(path)], "steps, losses, and how it ended")]
    for words, why in follow:
        console.print(escape(f"{shlex.join(words)}   # {why}"))
