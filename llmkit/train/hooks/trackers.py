"""Sends what is logged to Accelerate's trackers: TensorBoard, W&B, MLflow, Trackio and the rest.

Each tracker keeps one run for a training, whatever was killed and resumed, and takes the final scores into it later. How a
run is found again is kept in `trackers.json` beside the training. Keys and logins come from the environment and from the
trackers' own files, never from a recipe.
"""

from __future__ import annotations

import atexit
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmkit.data.personal.masking import without_secrets
from llmkit.errors import RecipeError, ResourceError
from llmkit.files import read_json, write_json
from llmkit.train.state import TrainState

_KEPT = "trackers.json"
_COUNT_ON = ("wandb", "trackio")  # steps by themselves, in a run that is opened again
_REMEMBER = ("tensorboard", "mlflow")  # the recipe of a run that is opened again, and take no other
_LOGS = "trackers"  # the folder of trackers that write files


@dataclass(frozen=True)
class Tracking:
    """Which trackers, for which training: its folder, the project and the name of the run in it; `where` for errors."""

    names: tuple[str, ...]
    folder: Path
    project: str
    run: str
    where: str

    def open(self, config: Mapping[str, Any], *, step: int) -> list[Any]:
        """Starts each tracker and gives it the recipe; one that knows this training goes on with it, after `step`.

        Raises RecipeError for a tracker whose package is missing, and ResourceError for one that does not start.
        """
        if not self.names:
            return []
        import torch
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        PartialState(cpu=not torch.cuda.is_available())  # which the trackers ask; a training has made it already
        available = {kind.value for kind in get_available_trackers()}
        missing = [name for name in self.names if name not in available]
        if missing:
            raise RecipeError(
                f"the tracker `{missing[0]}` is not installed",
                got=", ".join(self.names),
                expected="packages for all of them",
                hint=f"pip install {missing[0]}, or take it out",
                where=self.where,
            )
        known = read_json(self.folder / _KEPT) if (self.folder / _KEPT).is_file() else {}
        opened: list[Any] = []
        kept: dict[str, Any] = {}
        for name in self.names:
            resumed = name in known and step > 0
            about = known[name] if resumed else _identity(name)
            try:
                tracker = self._make(LOGGER_TYPE_TO_CLASS[name], name, about, resumed=resumed, step=step)
                with redirect_stdout(sys.stderr):  # some trackers talk; standard output is for the command's result
                    tracker.start()
                    if not resumed or name not in _REMEMBER:
                        tracker.store_init_configuration(dict(config))
            except Exception as error:
                for started in opened:
                    started.finish()
                raise ResourceError(
                    f"the tracker `{name}` does not start",
                    got=without_secrets(f"{type(error).__name__}: {error}").splitlines()[0],
                    hint="look at its own settings (a login, a server's address), or take it out",
                    where=self.where,
                ) from error
            kept[name] = about | _found(name, tracker)
            opened.append(tracker)
        write_json(self.folder / _KEPT, kept)
        if set(self.names) != {"tensorboard"}:
            atexit.register(_leave_standard_output)
        return opened

    def _make(self, kind: Any, name: str, about: dict[str, Any], *, resumed: bool, step: int) -> Any:
        """A tracker that has not been started."""
        if name == "tensorboard":
            return kind(self.project, str(self.folder / _LOGS), purge_step=step + 1 if resumed else None)
        options: dict[str, Any] = {"run_name" if name == "mlflow" else "name": self.run} | about
        if name == "wandb":
            options |= {"resume": "allow", "dir": str(self.folder)}
        if name == "trackio":
            options["resume"] = "allow" if resumed else "never"
        if name == "mlflow" and resumed:
            options.pop("run_name")
        if name not in ("wandb", "mlflow", "trackio"):
            options = {}
        if kind.requires_logging_directory:
            return kind(self.project, str(self.folder / _LOGS), **options)
        return kind(self.project, **options)


class TrackersHook:
    """Logs the steps that are to be logged, every evaluation and every event; a tracker that fails is left out from then on."""

    def __init__(self, trackers: Sequence[Any], is_logged: Callable[[int], bool], warn: Callable[[str], None]) -> None:
        self.trackers = list(trackers)
        self.is_logged = is_logged
        self.warn = warn

    def after_step(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs under `train/`."""
        if self.is_logged(state.step):
            self.log({f"train/{name}": value for name, value in values.items()}, state.step)

    def after_evaluation(self, state: TrainState, values: dict[str, Any]) -> None:
        """Logs under `held-out/`."""
        self.log({f"held-out/{name}": value for name, value in values.items()}, state.step)

    def after_event(self, state: TrainState, event: str, why: str) -> None:
        """Logs a 1 under `event/`: trackers take numbers."""
        self.log({f"event/{event.replace(' ', '_')}": 1}, state.step)

    def before_save(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Finishes each tracker; not `end_training`, which would also end the process group that a later stage needs."""
        self._each(lambda tracker: tracker.finish())

    def log(self, values: dict[str, Any], step: int) -> None:
        """Logs values as they are named."""
        self._each(lambda tracker: tracker.log(values, step=step))

    def log_last(self, values: dict[str, Any], step: int) -> None:
        """Logs values after the last step; a run of W&B or Trackio that is opened again takes none before its next."""
        self._each(lambda tracker: tracker.log(values, step=None if tracker.name in _COUNT_ON else step))

    def _each(self, do: Callable[[Any], None]) -> None:
        for tracker in list(self.trackers):
            try:
                with redirect_stdout(sys.stderr):
                    do(tracker)
            except Exception as error:
                told = without_secrets(f"{type(error).__name__}: {error}").splitlines()[0]
                self.warn(f"the tracker {tracker.name} failed, and is left out from here on: {told}")
                self.trackers.remove(tracker)


def track_scores(
    tracking: Tracking, config: Mapping[str, Any], scores: Mapping[str, Any], step: int, warn: Callable[[str], None]
) -> None:
    """Puts final scores under `scores/` into the runs of a training that was tracked and ended with `step`."""
    file = tracking.folder / _KEPT
    numbers = {f"scores/{name}": value for name, value in scores.items() if isinstance(value, int | float)}
    if not file.is_file() or not numbers:
        return
    again = Tracking(
        tuple(name for name in tracking.names if name in read_json(file)),
        *(tracking.folder, tracking.project, tracking.run, tracking.where),
    )
    try:
        hook = TrackersHook(again.open(config, step=max(step, 1)), lambda _: True, warn)
    except (RecipeError, ResourceError) as error:
        warn(f"the scores were not sent to trackers: {error.what}" + (f" ({error.got})" if error.got else ""))
        return
    for tracker in hook.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_hparams(dict(config), numbers, run_name="scores")
    hook.log_last(numbers, step)
    hook.close()


def flat_config(recipe: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """A recipe's values as dotted keys, which is what trackers take: no secrets, lists as text, nothing for null."""
    return dict(_flat(json.loads(without_secrets(json.dumps(recipe))), ""))


def _flat(value: Any, key: str) -> Iterator[tuple[str, str | int | float | bool]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        yield (
            key,
            ", ".join(map(str, value)) if not any(isinstance(i, dict | list) for i in value) else json.dumps(value),
        )
    elif value is not None:
        yield key, value


def _leave_standard_output() -> None:
    """Called before what trackers do at the very end: what they then say is not the command's result."""
    sys.stdout.flush()
    sys.stdout = sys.stderr


def _identity(name: str) -> dict[str, Any]:
    """What is chosen for a new run of a tracker, to find it again."""
    return {"id": secrets.token_hex(8)} if name == "wandb" else {}


def _found(name: str, tracker: Any) -> dict[str, Any]:
    """What a tracker chose itself."""
    return {"run_id": tracker.tracker.info.run_id} if name == "mlflow" else {}
