"""Runs stages in order; a stage whose inputs did not change is not run again, and it is said why or why not.

In a distributed run (torchrun, `accelerate launch`, srun) the first process decides and does what is not shared; the others
wait for it between stages.
"""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from llmkit import catalog
from llmkit.data.personal.masking import without_secrets
from llmkit.errors import (
    ArtifactError,
    DataError,
    InterruptedByUserError,
    LlmkitError,
    RecipeError,
    ResourceError,
    StoppedError,
    UsageError,
)
from llmkit.files import digest_json
from llmkit.recipe.schema import STAGES, Recipe
from llmkit.run.directory import Run
from llmkit.stages.base import Stage
from llmkit.stages.processes import Processes, losses_told, lost_process
from llmkit.stages.tracking import send_scores


@dataclass(frozen=True)
class Decision:
    """Whether a stage runs, and the reason as a sentence; `resume` keeps what an earlier try left."""

    stage: str
    runs: bool
    why: str
    resume: bool = False


def stages_for(recipe: Recipe, target: str | None) -> tuple[str, ...]:
    """The stages to look at: the whole plan, or one stage and all that it needs."""
    if target is None:
        return recipe.plan
    wanted, queue = {target}, [target]
    while queue:
        for name in _stage(queue.pop()).needs(recipe):
            if name not in wanted:
                wanted.add(name)
                queue.append(name)
    return tuple(name for name in STAGES if name in wanted)


def run_stages(
    recipe: Recipe,
    run: Run,
    target: str | None,
    *,
    resume: bool = True,
    anyway: bool = False,
    launch: Callable[[str], None] | None = None,
) -> list[Decision]:
    """Runs what has to run. With a `target`, another stage that trains is not started for it, but asked for.

    A training that was begun with other inputs is not gone on with, but `anyway`, from what of it fits. `launch` runs the
    command of a stage that trains in processes of its own; all that is not training is done here, before and after.
    Raises what the stages raise, StoppedError and InterruptedByUserError. run.json says where things stand in any case.
    """
    decisions = []
    with _stop_by_signal(run.deadline), losses_told():
        processes = Processes(recipe, run)
        run.record |= {"seed": recipe.seed, "parent": recipe.model}
        for name in stages_for(recipe, target):
            stage = _stage(name)
            decision, inputs = processes.decide(partial(_decide, stage, recipe, run, target, resume, anyway))
            decisions.append(decision)
            if not decision.runs:
                run.reporter.stage(name, "unchanged", decision.why)
                continue
            if stage.trains:
                _look_ahead(recipe, run, target, name)
            if launch is not None and (stage.distributed or stage.shares):  # which says itself that it runs
                with run.left_alone():
                    launch(name)
                continue
            run.reporter.stage(name, "running", decision.why)
            started = time.monotonic()
            if processes.lead:
                run.start(name, inputs, keep=decision.resume)
            processes.meet(run)
            with _noting_failure(run, stage):
                if stage.distributed or stage.shares:
                    processes.require_same(f"the inputs of {name}", partial(stage.inputs, recipe, run))
                if stage.shares and processes.count > 1:
                    sharing: Any = stage
                    sharing.share(recipe, run, processes.number, processes.count)
                    processes.meet(run)
                artifact = stage.run(recipe, run) if processes.lead or stage.distributed else None
            if artifact is not None and processes.lead:
                run.finish(artifact, time.monotonic() - started)
                send_scores(recipe, run, artifact)
                run.reporter.stage(name, "done", f"{time.monotonic() - started:.1f} s")
            processes.meet(run)
        processes.part()
    return decisions


def _look_ahead(recipe: Recipe, run: Run, target: str | None, name: str) -> None:
    """Lets the stages that come after a training say what they would refuse, before it begins."""
    names = stages_for(recipe, target)
    for later in map(_stage, names[names.index(name) + 1 :]):
        if (check := getattr(later, "check", None)) is not None:
            check(recipe, run)


def decide_all(
    recipe: Recipe, run: Run, target: str | None, *, resume: bool = True, anyway: bool = False
) -> list[Decision]:
    """What `run_stages` would do, without doing it."""
    decisions: list[Decision] = []
    for name in stages_for(recipe, target):
        stage = _stage(name)
        before = [d.stage for d in decisions if d.runs and d.stage in stage.needs(recipe)]
        if before:
            decisions.append(Decision(name, True, f"{' and '.join(before)} will run before it"))
        else:
            decisions.append(_decide(stage, recipe, run, target, resume, anyway)[0])
    return decisions


def _stage(name: str) -> Stage:
    found: Stage = catalog.resolve("stage", name)
    return found


def _decide(
    stage: Stage, recipe: Recipe, run: Run, target: str | None, resume: bool, anyway: bool
) -> tuple[Decision, dict[str, Any]]:
    """Compares a stage's inputs with those that it last ran on."""
    inputs = {"llmkit's own code": stage.version} | stage.inputs(recipe, run)
    entry = run.stage(stage.name)
    same = entry.get("fingerprint") == digest_json(inputs)
    if not resume and target in (None, stage.name):
        return Decision(stage.name, True, "asked to start anew (--no-resume)"), inputs
    if same and run.is_done(stage.name):
        return Decision(
            stage.name, False, f"its inputs are those of the last run ({entry['fingerprint'][:12]})"
        ), inputs
    if stage.trains and target not in (None, stage.name):
        state = "has other inputs now" if entry.get("state") == "done" else "is not done yet"
        raise ArtifactError(
            f"{stage.name} {state}, and {target} needs it",
            got=_why(run, stage.name, inputs, same),
            hint=f"run `llmkit {stage.name}` or `llmkit run` with the same recipe first",
            where=run.path,
        )
    goes_on = same and stage.resumes and entry.get("state") != "done"
    why = _why(run, stage.name, inputs, same)
    step = _step_reached(run, stage.name) if stage.trains and entry and not same else None
    if step is not None and not anyway:
        raise UsageError(
            f"{stage.name} stands at step {step} of a training with other inputs, which it cannot go on with exactly",
            got=why,
            expected="the inputs that it was begun with",
            hint="undo the change; or --resume-anyway to go on with what fits, or --no-resume to start anew (what there "
            "is moves to previous/)",
            where=run.folder(stage.name),
        )
    return Decision(stage.name, True, why, resume=goes_on or step is not None), inputs


def _step_reached(run: Run, stage: str) -> int | None:
    """The step of the newest checkpoint of a training that is not finished; None when there is none."""
    if run.stage(stage)["state"] == "done":
        return None
    from llmkit.run.checkpoint import published, step_of

    return max(map(step_of, published(run.folder(stage) / "checkpoints")), default=None)


def _why(run: Run, name: str, inputs: dict[str, Any], same: bool) -> str:
    """Why a stage runs, in a sentence."""
    entry = run.stage(name)
    if not entry:
        return "it has not run yet"
    if same and entry["state"] == "done":
        return f"its output is missing or changed: {', '.join(run.missing_files(name)[:3])}"
    if same:
        return f"it did not finish ({entry['state']})"
    before = entry.get("inputs", {})
    absent = object()  # which no value is, not even None
    changed = [key for key in sorted({*inputs, *before}) if inputs.get(key, absent) != before.get(key, absent)]
    return "changed: " + ", ".join(_change(key, before.get(key), inputs.get(key)) for key in changed[:4])


def _change(key: str, before: Any, now: Any) -> str:
    """`finetune.lr 1e-05 -> 2e-05` for a key of the recipe, the name alone for a digest."""
    if key.startswith("recipe."):
        return f"{key.removeprefix('recipe.')} {before} -> {now}"
    return key if key.startswith("the ") else f"the {key}"


@contextmanager
def _noting_failure(run: Run, stage: Stage) -> Iterator[None]:
    """Writes into run.json how a stage ended when it did not end well.

    A mistake in what a stage was given undoes its start, unless it has trained: what was there before is as good as ever.
    """
    name = stage.name
    try:
        yield
    except (StoppedError, InterruptedByUserError, KeyboardInterrupt):
        run.note_state(name, "stopped")
        raise
    except LlmkitError as error:
        mistaken = isinstance(error, RecipeError | DataError | UsageError) and not stage.trains
        if not (mistaken and run.take_back(name)):
            run.note_state(name, error.kind, why=without_secrets(": ".join(filter(None, (error.what, error.got)))))
        raise
    except Exception as error:
        lack = lost_process(error) or _lack_of_resources(error, name)
        run.note_state(name, "failed" if lack is None else lack.kind)
        if lack is None:
            raise
        raise lack from error


def _lack_of_resources(error: Exception, name: str) -> ResourceError | None:
    """What the machine lacked, when that is why a stage failed; PyTorch and safetensors have no types of their own for it."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or "can't allocate memory" in text:
        hint = f"set {name}.micro_batch_size to compute fewer examples at once, or lower data.max_length"
        return ResourceError("there is not enough memory", got=text.splitlines()[0] if text else None, hint=hint)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        return ResourceError(
            "the disk is full", got=text, hint="free some space; the same command then goes on from there"
        )
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return ResourceError(
            "there are no file handles left",
            got=text,
            hint="raise `ulimit -n`; the same command then goes on from there",
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return ResourceError(
            "a file cannot be written or read", got=text, hint="look at the permissions, or choose another -o"
        )
    return None


@contextmanager
def _stop_by_signal(deadline: float | None) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and the deadline end a stage that has nothing to save; training takes them over while it lasts."""

    def stop(number: int, frame: FrameType | None) -> None:
        name = "the time limit" if number == signal.SIGALRM else signal.Signals(number).name
        raise StoppedError(f"stopped by {name}", hint="run the same command again to go on from there")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)}
    try:
        if deadline is not None:
            signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 1e-3))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
