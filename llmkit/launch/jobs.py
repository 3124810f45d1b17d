"""What was asked of a cluster, as jobs: an array or one, and before it one that preprocesses without GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llmkit.errors import ArtifactError, LlmkitError, ResourceError, UsageError, did_you_mean
from llmkit.files import read_json, write_atomically, write_json
from llmkit.launch.limits import checkpoint_bytes, seconds_in, warning_for
from llmkit.launch.points import Point
from llmkit.launch.target import Job, Resources, Submitted, Target, Work
from llmkit.recipe.load import dump_recipe
from llmkit.recipe.schema import STAGES, Recipe
from llmkit.run.directory import Run
from llmkit.stages.pipeline import stages_for

FOLDER = "launch"  # of a run directory
_RECORD = "jobs.json"


@dataclass(frozen=True)
class Asked:
    """What was typed, but for the recipe. Raises UsageError for what does not go together."""

    to: str
    stage: str
    nodes: int
    gpus: int | None
    processes: int | None
    time: str
    warning: str | None
    cpus: int | None
    memory: str | None
    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    others: tuple[str, ...]
    arrays: tuple[str, ...]
    at_once: int | None
    after: tuple[str, ...]
    cpu_first: bool | None
    cpu_partition: str | None
    requeues: int

    def __post_init__(self) -> None:
        if not self.time:
            raise UsageError("--time is missing", expected="how long a job may take, such as --time 4:00:00")
        if self.stage not in (*STAGES, "run"):
            raise UsageError(
                f"there is no stage `{self.stage}`",
                expected="run, or one of " + ", ".join(STAGES),
                hint=did_you_mean(self.stage, ("run", *STAGES)),
                where="--stage",
            )
        if self.gpus is not None and self.processes is not None:
            raise UsageError(
                "--gpus and --processes are both given",
                expected="--gpus, with a process for each; --processes where there are none",
            )
        if self.at_once is not None and not self.arrays:
            raise UsageError("--at-once is for --array", got=f"--at-once {self.at_once}", hint="leave it out")
        for job in self.after:
            if not job.isascii() or not job.isdigit():
                raise UsageError("--after takes the number of a job", got=job, expected="for example --after 4711")


def jobs_for(asked: Asked, recipe: Recipe, path: Path, recipes: Sequence[tuple[Point, Recipe]]) -> list[Job]:
    """The job, and before it the one that preprocesses without GPUs where there is one.

    Raises UsageError, and what finding the model's config raises.
    """
    resources = _resources(asked, recipe)
    folder = path / FOLDER
    works = tuple(Work(folder / f"{point.name}.yaml", run_of(point, asked, path)) for point, _ in recipes)
    job = Job(
        recipe.name, asked.stage, works, folder, resources, bool(asked.arrays), asked.at_once, requeues=asked.requeues
    )
    needed = stages_for(recipe, None if asked.stage == "run" else asked.stage)
    first = asked.cpu_first if asked.cpu_first is not None else resources.gpus > 0
    if first and "preprocess" in needed and len(needed) > 1:
        return [replace(job, stage="preprocess", resources=_without_gpus(asked, resources)), job]
    if asked.cpu_first or asked.cpu_partition:
        raise UsageError(
            "there is no job that preprocesses before the other",
            got="--cpu-first" if asked.cpu_first else f"--cpu-partition {asked.cpu_partition}",
            expected=f"a recipe whose `{asked.stage}` needs `preprocess`"
            if first
            else "--gpus, or --cpu-first beside it",
            hint="leave it out",
        )
    return [job]


def run_of(point: Point, asked: Asked, path: Path) -> Path:
    """The run directory of one job."""
    return path / point.name if asked.arrays else path


def _resources(asked: Asked, recipe: Recipe) -> Resources:
    """What the job asks for. Raises UsageError for a time that is none, or too short."""
    gpus = asked.gpus or (recipe.launch.gpus if asked.processes is None else None) or 0
    limit = seconds_in(asked.time)
    warning = None if asked.warning is None else seconds_in(asked.warning, "--warning")
    return Resources(
        seconds=limit,
        warning=warning_for(limit, warning, checkpoint_bytes(recipe)),
        nodes=asked.nodes,
        processes=gpus or asked.processes or recipe.launch.processes or 1,
        gpus=gpus,
        cpus=asked.cpus,
        memory=asked.memory,
        partition=asked.partition,
        account=asked.account,
        qos=asked.qos,
        constraint=asked.constraint,
        others=tuple(
            (key, value if equals else None) for key, equals, value in (o.partition("=") for o in asked.others)
        ),
    )


def _without_gpus(asked: Asked, resources: Resources) -> Resources:
    """One process on one node, with the cores of all that will be there."""
    return replace(
        resources,
        nodes=1,
        processes=1,
        gpus=0,
        cpus=resources.cpus and resources.cpus * resources.processes,
        partition=asked.cpu_partition or resources.partition,
        constraint=None,
        others=tuple((key, value) for key, value in resources.others if not key.startswith(("gpu", "gres", "tres"))),
    )


def refuse_no_place(asked: Asked, path: Path, recipes: Sequence[tuple[Point, Recipe]]) -> None:
    """Raises UsageError when a run directory is taken by something else."""
    for point, recipe in recipes:
        Run.peek(run_of(point, asked, path), recipe.name)
    is_run = (path / "run.json").exists()
    if asked.arrays and (is_run or (path.is_dir() and any(path.iterdir()) and not (path / FOLDER).is_dir())):
        raise UsageError(
            "the directory is a run" if is_run else "the directory holds other things",
            got=path,
            expected="a new directory: each job of an array has its run below it",
            hint="choose another -o",
        )


def refuse_twice(target: Target, path: Path, asked: Asked) -> None:
    """Raises ResourceError when jobs of this run wait or run still, unless this one is to come after them."""
    record = path / FOLDER / _RECORD
    if not record.exists():
        return
    try:
        known = [str(entry["id"]) for entry in read_json(record)]
    except (ArtifactError, KeyError, TypeError):
        return  # what is no record of ours; the run's own lock keeps two jobs apart
    busy = target.waiting([number for number in known if number not in asked.after])
    if busy:
        raise ResourceError(
            "the run has jobs in the queue already",
            got=", ".join(busy),
            expected="one job at a time in a run",
            hint=f"--after {busy[-1]}, or `scancel {' '.join(busy)}`, or another -o",
            where=path,
        )


def write_jobs(target: Target, jobs: Sequence[Job], recipes: Sequence[tuple[Point, Recipe]]) -> None:
    """Writes recipes and scripts; how many processes there are, the job says and not the recipe. Raises ResourceError."""
    folder = jobs[0].folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for point, recipe in recipes:
            launch = recipe.launch.model_copy(update={"gpus": None, "processes": None})
            launched = recipe.model_copy(update={"launch": launch})
            write_atomically(folder / f"{point.name}.yaml", dump_recipe(launched))
        for job in jobs:
            write_atomically(target.place(job), target.script(job))
    except OSError as error:
        raise ResourceError(
            "the run directory cannot be written",
            got=error.strerror or str(error),
            where=folder,
            hint="choose another -o, on a disk that the nodes see",
        ) from None


def hand_in(target: Target, jobs: Sequence[Job], asked: Asked) -> list[Submitted]:
    """Hands the jobs in, each to wait for the one before it, and keeps their numbers with the run; all of them, or none."""
    done: list[Submitted] = []
    for job in jobs:
        try:
            done.append(target.submit(job, *waits_for(asked, job, [before.id for before in done])))
        except LlmkitError:
            if done:
                target.cancel([before.id for before in done])
            raise
    write_json(jobs[0].folder / _RECORD, [entry(target, one) for one in done])
    return done


def waits_for(asked: Asked, job: Job, before: Sequence[str]) -> tuple[list[str], str | None]:
    """The jobs that have to be done first, and the array each of whose jobs one of this array waits for."""
    if not before:
        return list(asked.after), None
    return ([], before[0]) if job.is_array else ([*before], None)


def entry(target: Target, job: Submitted) -> dict[str, str | None]:
    """What is kept, and told to scripts, of a job that was handed in."""
    place = str(target.place(job.job))
    return {"id": job.id, "stage": job.job.stage, "script": place, "log": job.log, "waits_for": job.waits_for}
