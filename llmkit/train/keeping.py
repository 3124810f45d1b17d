"""What a training keeps, so that it can go on as if nothing had happened: checkpoints, and the best weights so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llmkit.errors import ArtifactError, ResourceError
from llmkit.files import link_file
from llmkit.optim.state import optimizer_from_parts, optimizer_to_parts
from llmkit.run.checkpoint import (
    Checkpoint,
    Checkpoints,
    published,
    step_of,
)
from llmkit.train.checking import OUTER, check_checkpoint, has_outer
from llmkit.train.local import Meetings
from llmkit.train.masters import Average, Masters
from llmkit.train.state import TrainState, random_state, restore_random_state
from llmkit.train.taking_over import fitting_parts

_AVERAGE = "average/"  # before the names of weights in a checkpoint: what belongs to them
_FAILURES = 3  # in a row, after which a training ends
_WRITING = (OSError, SafetensorError)  # what a disk can do to a checkpoint


@dataclass
class Keeper:
    """Saves and restores one training, below `folder`; every process must call its methods.

    With `behind`, checkpoints are copied and written while training goes on; it then takes the memory of a copy.
    """

    accelerator: Any
    folder: Path
    checkpoints: Checkpoints
    masters: Masters
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: torch.amp.GradScaler | None
    warn: Callable[[str], None]
    behind: bool = False
    meetings: Meetings | None = None
    saved_step: int | None = None
    failures: int = 0  # in a row
    failed: bool = False  # since it was last asked for
    _copy: Checkpoint | None = field(default=None, init=False)  # what was written behind last

    @property
    def _writes(self) -> bool:
        """True where this process has something to write: in the first one, or in all where each has a part."""
        return bool(self.accelerator.is_main_process) or self.masters.sharded

    @property
    def best_file(self) -> Path:
        """The weights with the lowest held-out loss so far."""
        return self.folder / "best.safetensors"

    def rehearse(self) -> int:
        """Finds out whether checkpoints have place and can be written; gives about how many bytes one will have.

        Raises ResourceError.
        """
        weights = sum(tensor.nbytes for tensor in self.masters.outlines().values())
        states = 3 if self.average is None else 4  # the weights, two moments of each, and the average
        if self._writes:
            self.checkpoints.rehearse(states * weights)
        return states * weights

    def save(self, state: TrainState, *, at_once: bool = False, before: Callable[[], None] = lambda: None) -> float:
        """Publishes a checkpoint of this step, behind training unless `at_once`; gives the seconds that training waited.

        `before` has to have worked (the log is on the disk).
        One that cannot be written is warned of, and the one before it stands; at once, it raises ResourceError.
        """
        from accelerate.utils import gather_object

        started = time.monotonic()
        random = gather_object([random_state()])
        self.saved_step = state.step
        if not self._writes:
            return time.monotonic() - started
        self.collect(wait=True)
        checkpoint = self._checkpoint(state, random)
        try:
            if at_once or not self.behind:
                self.checkpoints.write(state.step, checkpoint, before)
                self.failures = 0
            else:
                if self.accelerator.device.type == "cpu":  # else it is a copy already
                    checkpoint = self._copy = checkpoint.copied(self._copy)
                self.checkpoints.write_behind(state.step, checkpoint, before)
        except _WRITING as error:
            self._note_failure(error)
            if at_once:
                raise self.error(error) from None
        return time.monotonic() - started

    def collect(self, *, wait: bool = False) -> None:
        """Takes in how writing behind went, if that has ended, or with `wait` once it has."""
        if not wait and self.checkpoints.is_writing:
            return
        try:
            if self.checkpoints.wait():
                self.failures = 0
        except _WRITING as error:
            self._note_failure(error)

    def take_failure(self) -> bool:
        """True when saving has failed since this was last asked."""
        failed, self.failed = self.failed, False
        return failed

    @property
    def gave_up(self) -> bool:
        """True when it is no use to go on without being able to save."""
        return self.failures >= _FAILURES

    def error(self, cause: BaseException | None = None) -> ResourceError:
        """What to raise when a training ends because it cannot save."""
        newest = next(iter(published(self.checkpoints.folder)), None)
        stands = f"the one of step {step_of(newest)} stands" if newest else "there is none"
        return ResourceError(
            f"a checkpoint could not be written; {stands}",
            got=str(cause) if cause else f"{self.failures} failures in a row",
            hint="free some space or mend the disk; the same command goes on from there",
            where=self.checkpoints.folder,
        )

    def restore(self, warn: Callable[[str], None], *, anchors: bool = False) -> TrainState | None:
        """Goes back to the newest checkpoint, or anchor, for the same inputs; None when there is none.

        One for other inputs that the run accepts (`--resume-anyway`) gives what fits; `warn` is told what that is. Raises
        ArtifactError when not all processes find the same.
        """
        leads = bool(self.accelerator.is_main_process)
        with self.accelerator.main_process_first():  # which sets damaged ones aside
            found = self.checkpoints.newest(warn, self._check, anchors=anchors, sets_aside=leads)
        self._require_same(found)
        if found is None:
            return None
        if found.fingerprint != self.checkpoints.fingerprint:
            found = fitting_parts(found, self._present(), warn)
        self.masters.load(found.weights)
        for prefix, companion in self._companions():
            if prefix == OUTER and companion.outlines() and not has_outer(found):
                warn("the outer optimizer's momentum begins anew: the checkpoint is of a training in one process")
            companion.load(found.weights, prefix)
        if found.best_weights is not None and self.accelerator.is_main_process:
            link_file(found.best_weights, self.best_file)
        names = self._names()
        moments = {
            key: self.masters.rows(names[int(key.partition(".")[0])], tensor)
            for key, tensor in found.optimizer_tensors.items()
        }
        optimizer_from_parts(self.optimizer, moments, found.optimizer_values)
        processes = found.state["random"]
        restore_random_state(processes[self.masters.mesh_among(self.accelerator).speaker % len(processes)])
        if self.scaler is not None and found.state["scaler"]:
            self.scaler.load_state_dict(found.state["scaler"])
        state = TrainState(**found.state["state"])
        self.saved_step = state.step
        return state

    def _require_same(self, found: Checkpoint | None) -> None:
        """Raises ArtifactError when another process goes on from another step, or from none."""
        from accelerate.utils import gather_object

        steps = gather_object([None if found is None else found.step])
        if len(set(steps)) > 1:
            said = ", ".join(f"process {n}: {'none' if step is None else step}" for n, step in enumerate(steps))
            raise ArtifactError(
                "the processes do not find the same checkpoint",
                got=said[:500],
                hint="the folder has to be the same for all hosts; the same command tries again",
                where=self.checkpoints.folder,
            )

    def keep_best(self) -> None:
        """Writes the weights as they are as the best so far."""
        weights = self.masters.whole() if self._writes else {}
        if self.accelerator.is_main_process:
            aside = self.best_file.with_suffix(".tmp")
            save_file(weights, aside)
            aside.replace(self.best_file)

    def settle(self, state: TrainState, keep: str) -> None:
        """Puts the weights that are wanted into the model: the best or the last ones, averaged where there are averages.

        The last ones are kept in a checkpoint when they are not those.
        """
        self.collect(wait=True)
        self._copy = None
        if self.accelerator.is_main_process:
            with suppress(OSError):
                self.checkpoints.prune()  # what a process that was killed had not come to
        if keep == "last" or state.best_step in (None, state.step):
            if self.average is not None:
                self.average.settle()
            return
        if self.saved_step != state.step:
            self.save(state, at_once=True)
        self.accelerator.wait_for_everyone()
        self.masters.load(load_file(self.best_file))

    def disposable(self, state: TrainState) -> tuple[Path, ...]:
        """What is not needed once the model stands: all that served to resume, unless the best weights are not the last."""
        if state.best_step not in (None, state.step):
            return ()
        every, folder = self.checkpoints.keep_every, self.checkpoints.folder
        if every is None:
            return (folder, self.best_file)
        return (*(path for path in published(folder) if step_of(path) % every), self.best_file)

    def _checkpoint(self, state: TrainState, random: list[Any]) -> Checkpoint:
        tensors, values = optimizer_to_parts(self.optimizer)
        names = self._names()
        moments = self.masters.parts({key: (names[int(key.partition(".")[0])], t) for key, t in tensors.items()})
        weights = self.masters.saved()
        for prefix, companion in self._companions():
            weights |= {prefix + name: tensor for name, tensor in companion.saved().items()}
        return Checkpoint(
            weights, moments, values, self._about(state, random), self.best_file if state.best_step else None
        )

    def _present(self) -> Checkpoint:
        """What a checkpoint of this training would hold now, its weights as meta tensors."""
        weights = self.masters.outlines()
        for prefix, companion in self._companions():
            weights |= {prefix + name: tensor for name, tensor in companion.outlines().items()}
        tensors, values = optimizer_to_parts(self.optimizer)
        return Checkpoint(weights, tensors, values, self._about(TrainState(), [random_state()]))

    def _companions(self) -> list[tuple[str, Average | Meetings]]:
        """What goes with the weights, shaped as they are."""
        pairs = ((_AVERAGE, self.average), (OUTER, self.meetings))
        return [(prefix, companion) for prefix, companion in pairs if companion is not None]

    def _about(self, state: TrainState, random: list[Any]) -> dict[str, Any]:
        scaler = self.scaler.state_dict() if self.scaler else None
        return {"state": state.to_json(), "random": random, "scaler": scaler}

    def _names(self) -> list[str]:
        """The parameters' names in the order of the optimizer's numbers."""
        return [name for group in self.optimizer.param_groups for name in group["names"]]

    def _check(self, found: Checkpoint) -> None:
        same_inputs = found.fingerprint == self.checkpoints.fingerprint
        check_checkpoint(found.outlined(), self._present(), same_inputs=same_inputs)

    def _note_failure(self, error: BaseException) -> None:
        self.failures, self.failed = self.failures + 1, True
        self.warn(f"{self.error(error).what}: {error}; failure {self.failures} of {_FAILURES} in a row")
