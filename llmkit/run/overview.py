"""What the runs below a folder are doing, told from what they left on disk; nothing in a run is written or held."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from llmkit.errors import ArtifactError
from llmkit.files import read_json
from llmkit.run.held import is_held
from llmkit.run.newest import newest_logged, number, whole

STATES = ("alive", "crashed", "diverged", "failed", "stopped", "partial", "done", "new", "damaged")
TRAINS = ("finetune", "pretrain")
_STAGE = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_MOST_JSON = 2**26  # bytes; more is no run.json of ours
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Overview:
    """One run. `stage` is the one in hand, or the next; step and losses are those of the training nearest to it."""

    path: Path
    name: str
    state: str  # one of STATES
    why: str | None = None  # of a failed run the error's kind or `bug`, of a damaged one what is wrong
    stage: str | None = None
    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    event: str | None = None  # the newest: a step that was skipped, a spike, ...
    checkpoint: int | None = None  # the step that the stage in hand can go on from
    created: str | None = None
    active: float | None = None  # seconds since the epoch
    task: str | None = None
    model: str | None = None
    pid: int | None = None  # of the process that opened the run last
    host: str | None = None
    next: str | None = None  # the command line that goes on


def find_runs(folders: Iterable[Path], unreadable: Callable[[Path], None] = lambda path: None) -> Iterator[Path]:
    """Run directories at or below some folders, each once; nothing is looked for inside a run.

    A link is followed to a run, but not to a folder of runs. A folder that cannot be read is told to `unreadable`.
    """
    seen: set[str] = set()
    waiting = list(folders)[::-1]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                items = sorted(entries, key=lambda entry: entry.name, reverse=True)
        except OSError:
            unreadable(folder)
            continue
        if any(item.name == "run.json" for item in items):
            real = os.path.realpath(folder)
            if real not in seen:
                seen.add(real)
                yield folder
            continue
        for item in items:
            place = folder / item.name
            linked = item.is_symlink() and os.path.lexists(place / "run.json")
            if not item.name.startswith(".") and (item.is_dir(follow_symlinks=False) or linked):
                waiting.append(place)


def read_overview(path: Path) -> Overview:
    """One run as it stands. Damage in it makes its state `damaged` and raises nothing."""
    try:
        record = read_record(path)
    except ArtifactError as error:
        return _damaged(path, path.resolve().name, f"run.json: {error.what}")
    process = _mapping(record.get("process"))
    held = is_held(path, process)
    name = _text(record.get("name")) or path.resolve().name
    recipe = read_recipe(path, head=True)
    if recipe is None and not held:
        return _damaged(path, name, "recipe.yaml is missing or no recipe")
    plan = _plan(recipe or {})
    state, why, stage = _state(record["stages"], plan, held=held)
    training = _training(record["stages"], stage)
    known = _progress(path, record["stages"], training)
    checkpoint = _checkpoint(path, stage) if state not in ("done", "partial", "new") else None
    if checkpoint is not None and stage == training:
        known["step"] = max(checkpoint, known.get("step") or 0)  # not every step is logged
    return Overview(
        path=path,
        name=name,
        state=state,
        why=why,
        stage=stage,
        **known,
        checkpoint=checkpoint,
        created=_text(record.get("created")),
        active=_active(path, stage),
        task=_text((recipe or {}).get("task")),
        model=_text(record.get("parent") or (recipe or {}).get("model")),
        pid=whole(process.get("pid")),
        host=_text(process.get("host")),
        next=_next(path, record, plan, state, stage),
    )


def read_record(path: Path) -> dict[str, Any]:
    """A run's run.json with its stages as mappings. Raises ArtifactError."""
    file = path / "run.json"
    try:
        if file.exists() and not file.is_file():
            raise ArtifactError("it is no file", got="something else", where=file)
        if file.stat().st_size > _MOST_JSON:
            raise ArtifactError("it is too large", got=f"{file.stat().st_size} bytes", where=file)
        record = read_json(file)
    except RecursionError:
        raise ArtifactError("it is nested too deep", where=file) from None
    except OSError as error:
        raise ArtifactError("it is missing or cannot be read", got=error.strerror, where=file) from None
    stages = record.get("stages") if isinstance(record, dict) else None
    sane = isinstance(stages, dict) and all(_STAGE.fullmatch(s) and isinstance(e, dict) for s, e in stages.items())
    if not sane:
        raise ArtifactError("it is no record of a run", got=type(record).__name__, where=file)
    found: dict[str, Any] = record
    return found


def read_recipe(path: Path, *, head: bool = False) -> dict[str, Any] | None:
    """A run's recipe.yaml as it stands, or None when it is none; of the `head`, only what comes before `data`."""
    file = path / "recipe.yaml"
    try:
        if not file.is_file() or file.stat().st_size > _MOST_JSON:
            return None
        text = file.read_bytes()
        found = yaml.load(text.partition(b"\ndata:")[0] if head else text, _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    if head and isinstance(found, dict) and "stages" not in found:  # not as llmkit writes it
        return read_recipe(path)
    return found if isinstance(found, dict) else None


def _damaged(path: Path, name: str, why: str) -> Overview:
    command = f"llmkit verify {shlex.quote(str(path))}"
    return Overview(path, name, "damaged", why, active=_active(path, None), next=command)


def _plan(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages that a recipe, as a run keeps it, names."""
    stages = recipe.get("stages")
    return tuple(str(s) for s in stages if _STAGE.fullmatch(str(s))) if isinstance(stages, list) else ()


def _state(
    stages: Mapping[str, Mapping[str, Any]], plan: tuple[str, ...], *, held: bool
) -> tuple[str, str | None, str | None]:
    """The state of a run, why, and the stage in hand."""
    order = sorted(stages, key=lambda stage: str(stages[stage].get("started")))
    running = [stage for stage in order if stages[stage].get("state") == "running"]
    if held:
        return "alive", None, running[-1] if running else None
    if running:
        return "crashed", None, running[-1]
    # A stage that the recipe has no longer, or never had, counts only when it was the last thing tried.
    ended = [(stage, str(stages[stage].get("state"))) for stage in order if stage in plan or stage == order[-1]]
    unfinished = [(stage, state) for stage, state in ended if state != "done"]
    if unfinished:
        stage, state = unfinished[-1]
        kind = "bug" if state == "failed" else state
        return (state, None, stage) if state in ("stopped", "diverged") else ("failed", kind, stage)
    remaining = [stage for stage in plan if stage not in stages]
    if remaining:
        return ("partial" if stages else "new"), None, remaining[0]
    return ("done" if stages else "new"), None, order[-1] if order else None


def _training(stages: Mapping[str, Any], stage: str | None) -> str | None:
    """The training that a run is at or has come from."""
    return stage if stage in TRAINS and stage in stages else next((name for name in TRAINS if name in stages), None)


def _progress(path: Path, stages: Mapping[str, Any], stage: str | None) -> dict[str, Any]:
    """Step, total and losses of a training: from run.json when it is done, else from the end of metrics.jsonl."""
    if stage is None:
        return {}
    entry = stages[stage]
    metrics = _mapping(entry.get("metrics"))
    log = path / "metrics.jsonl"
    fresh = entry.get("state") == "running" and _is_older(log, entry.get("started"))
    stale = fresh and _checkpoint(path, stage) is None  # what the log has is of an earlier try
    found = {} if stale else newest_logged(log, stage, held_out="eval_loss" not in metrics)
    steps = whole(metrics.get("steps"))
    return {
        "step": found.get("step") if steps is None else steps,
        "total_steps": whole(entry.get("total_steps"))
        or whole(_mapping(entry.get("inputs")).get(f"recipe.{stage}.steps"))
        or steps,
        "loss": found.get("loss", number(metrics.get("train_loss"))),
        "eval_loss": number(metrics.get("eval_loss")) if metrics else found.get("eval_loss"),
        "event": found.get("event"),
    }


def _is_older(file: Path, started: Any) -> bool:
    """True when a file was last written before a time in ISO format."""
    try:
        return file.stat().st_mtime < datetime.fromisoformat(started).timestamp()
    except (OSError, TypeError, ValueError):
        return False


def _checkpoint(path: Path, stage: str | None) -> int | None:
    """The step of the newest checkpoint that was published."""
    if stage is None:
        return None
    try:
        names = [item.name for item in (path / stage / "checkpoints").iterdir() if not item.is_symlink()]
    except OSError:
        return None
    steps = [name.removeprefix("step-") for name in names if name.startswith("step-")]
    return max((int(step) for step in steps if step.isdecimal() and step.isascii()), default=None)


def _active(path: Path, stage: str | None) -> float | None:
    """When something in a run was last written."""
    places = [path / "run.json", path / "metrics.jsonl"]
    if stage is not None:
        with contextlib.suppress(OSError):
            places += [path / stage, *(path / stage).iterdir()]
    times = []
    for place in places:
        with contextlib.suppress(OSError):
            times.append(place.lstat().st_mtime)
    return max(times, default=None)


def _next(path: Path, record: Mapping[str, Any], plan: tuple[str, ...], state: str, stage: str | None) -> str | None:
    """The command line that goes on; None when there is nothing to do."""
    if state in ("alive", "done") or stage is None:
        return None
    command = f"llmkit {'run' if stage in plan else stage} {shlex.quote(str(path))}"
    if state != "diverged":
        return command
    given = _mapping(record["stages"][stage].get("inputs")).get(f"recipe.{stage}.lr")
    guessed = _mapping(_mapping(record.get("guesses")).get(f"{stage}.lr")).get("value")
    rate = number(given) or number(guessed)
    change = f"{stage}.lr={rate / 2:g}" if rate else f"{stage}.divergence.nan=rollback"
    return f"{command} --set {change} --resume-anyway"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    """A JSON value that is text which can be written, or None."""
    return value if isinstance(value, str) and value.encode(errors="ignore").decode() == value else None
