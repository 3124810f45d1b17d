"""What a training keeps, so that it can go on as if nothing had happened: checkpoints, and the best weights so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmkit.run.checkpoint import (
    Checkpoint,
    link_file,
    optimizer_from_parts,
    optimizer_to_parts,
    read_newest,
    write_checkpoint,
)
from llmkit.train.masters import Average, Masters
from llmkit.train.state import TrainState, random_state, restore_random_state

_AVERAGE = "average/"  # before the names of averaged weights in a checkpoint


@dataclass
class Keeper:
    """Saves and restores one training, below `folder`; every process must call its methods."""

    accelerator: Any
    folder: Path
    fingerprint: str
    masters: Masters
    optimizer: torch.optim.Optimizer
    average: Average | None
    scaler: torch.amp.GradScaler | None
    keep_checkpoints: int
    saved_step: int | None = None

    @property
    def best_file(self) -> Path:
        """The weights with the lowest held-out loss so far."""
        return self.folder / "best.safetensors"

    def save(self, state: TrainState) -> None:
        """Publishes a checkpoint of this step."""
        from accelerate.utils import gather_object

        random = gather_object([random_state()])
        self.saved_step = state.step
        if not self.accelerator.is_main_process:
            return
        tensors, values = optimizer_to_parts(self.optimizer)
        averaged = self.average.tensors if self.average else {}
        weights = self.masters.saved() | {_AVERAGE + name: t.cpu().contiguous() for name, t in averaged.items()}
        scaler = self.scaler.state_dict() if self.scaler else None
        write_checkpoint(
            self.folder / "checkpoints",
            state.step,
            self.fingerprint,
            Checkpoint(
                weights,
                tensors,
                values,
                {"state": state.to_json(), "random": random, "scaler": scaler},
                self.best_file if state.best_step else None,
            ),
            keep=self.keep_checkpoints,
        )

    def restore(self, warn: Callable[[str], None]) -> TrainState | None:
        """Goes back to the newest checkpoint for the same inputs; None when there is none."""
        with self.accelerator.main_process_first():  # which sets damaged ones aside
            found = read_newest(self.folder / "checkpoints", self.fingerprint, warn)
        if found is None:
            return None
        self.masters.load({n: t for n, t in found.weights.items() if not n.startswith(_AVERAGE)})
        if self.average is not None:
            averaged = {n.removeprefix(_AVERAGE): t for n, t in found.weights.items() if n.startswith(_AVERAGE)}
            self.average.load(averaged)
        if found.best_weights is not None and self.accelerator.is_main_process:
            link_file(found.best_weights, self.best_file)
        optimizer_from_parts(self.optimizer, found.optimizer_tensors, found.optimizer_values)
        processes = found.state["random"]
        restore_random_state(processes[self.accelerator.process_index % len(processes)])
        if self.scaler is not None and found.state["scaler"]:
            self.scaler.load_state_dict(found.state["scaler"])
        state = TrainState(**found.state["state"])
        self.saved_step = state.step
        return state

    def keep_best(self) -> None:
        """Writes the weights as they are as the best so far."""
        if self.accelerator.is_main_process:
            aside = self.best_file.with_suffix(".tmp")
            save_file(self.masters.saved(), aside)
            aside.replace(self.best_file)

    def settle(self, state: TrainState, keep: str) -> None:
        """Puts the weights that are wanted into the model: the best or the last ones, averaged where there are averages.

        The last ones are kept in a checkpoint when they are not those.
        """
        if keep == "last" or state.best_step in (None, state.step):
            if self.average is not None:
                self.masters.load(self.average.tensors)
            return
        if self.saved_step != state.step:
            self.save(state)
        self.accelerator.wait_for_everyone()
        self.masters.load(load_file(self.best_file))

    def disposable(self, state: TrainState) -> tuple[Path, ...]:
        """What is not needed once the model stands: all that served to resume, unless the best weights are not the last."""
        best_is_last = state.best_step in (None, state.step)
        return (self.folder / "checkpoints", self.best_file) if best_is_last else ()
