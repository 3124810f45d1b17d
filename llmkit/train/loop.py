"""The training loop, top to bottom: resume, then step, log, evaluate, save, stop.

The order of the data is a function of the seed and the step, and a checkpoint holds all other state, so a training that
was stopped and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from llmkit.data.batches import BatchOrder, by_length
from llmkit.data.corpus import Corpus
from llmkit.errors import DataError, DivergedError
from llmkit.model.precision import autocast
from llmkit.optim.schedules import Progress
from llmkit.recipe.training import Training
from llmkit.recipe.values import count_of, seconds_of
from llmkit.run.checkpoint import (
    Checkpoint,
    link_file,
    optimizer_from_parts,
    optimizer_to_parts,
    read_newest,
    write_checkpoint,
)
from llmkit.train.hooks import Hook
from llmkit.train.signals import StopRequest
from llmkit.train.state import TrainState, random_state, restore_random_state
from llmkit.train.step import Objective, Stepper

Schedule = Callable[[Progress], float]


@dataclass
class Fit:
    """A training: what learns, from what, how, and where it is kept."""

    accelerator: Any
    model: Any
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    training: Training
    train: Corpus
    held_out: Corpus | None
    seed: int
    precision: str
    folder: Path
    fingerprint: str
    warn: Callable[[str], None]
    eval_batch_size: int = 16
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        if not len(self.train):
            raise DataError("there is no example to train on", where=self.train.folder, hint="look at rejected.jsonl")
        self.order = BatchOrder(self.train.lengths(self.objective.size_column), self.training.batch_size, self.seed)
        epochs = self.training.epochs or 1.0
        self.total_steps = self.training.steps or max(1, math.ceil(epochs * self.order.steps_per_epoch))
        self.warmup_steps = count_of(self.training.warmup, self.total_steps)
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.model = self.accelerator.prepare(self.model)
        scaler = torch.amp.GradScaler(self.accelerator.device.type) if self.precision == "fp16" else None
        self.stepper = Stepper(
            self.accelerator,
            self.model,
            self.objective,
            self.optimizer,
            self.precision,
            self.training.micro_batch_size,
            self.training.max_grad_norm,
            scaler,
        )
        self.best_file = self.folder / "best.safetensors"
        self._saved_step: int | None = None

    @property
    def unwrapped(self) -> Any:
        """The model itself."""
        return self.accelerator.unwrap_model(self.model)

    def run(self, hooks: Sequence[Hook]) -> TrainState:
        """Trains to the last step. The model then holds the best weights, or the last, as the recipe says.

        Raises StoppedError or InterruptedByUserError, after saving, when a signal came, and DivergedError.
        """
        self.model.train()
        saved_at, saved_step = time.monotonic(), self.state.step
        try:
            with StopRequest() as request:
                while self.state.step < self.total_steps and not self._has_stalled():
                    stop = self._step(hooks, request.received is not None)
                    if self._evaluation_is_due():
                        self._evaluate(hooks)
                    if stop or self._save_is_due(saved_at, saved_step):
                        self.save()
                        saved_at, saved_step = time.monotonic(), self.state.step
                    if stop:
                        raise request.error(self.state.step)
                if any(self.stepper.sum_over_processes([int(request.received is not None)])):  # during the last step
                    self.save()
                    raise request.error(self.state.step)
        finally:
            for hook in hooks:
                hook.close()
        self._settle()
        return self.state

    def resume(self) -> bool:
        """Goes back to the newest checkpoint of this folder, if there is one for the same inputs."""
        with self.accelerator.main_process_first():  # which sets damaged ones aside
            found = read_newest(self.folder / "checkpoints", self.fingerprint, self.warn)
        if found is None:
            return False
        self._load(found.weights)
        if found.best_weights is not None and self.accelerator.is_main_process:
            link_file(found.best_weights, self.best_file)
        optimizer_from_parts(self.optimizer, found.optimizer_tensors, found.optimizer_values)
        self.state = TrainState(**found.state["state"])
        self._saved_step = self.state.step
        processes = found.state["random"]
        restore_random_state(processes[self.accelerator.process_index % len(processes)])
        if self.stepper.scaler is not None and found.state["scaler"]:
            self.stepper.scaler.load_state_dict(found.state["scaler"])
        return True

    def save(self) -> None:
        """Publishes a checkpoint of this step; every process must call it."""
        from accelerate.utils import gather_object

        random = gather_object([random_state()])
        self._saved_step = self.state.step
        if not self.accelerator.is_main_process:
            return
        tensors, values = optimizer_to_parts(self.optimizer)
        scaler = self.stepper.scaler.state_dict() if self.stepper.scaler else None
        state = {"state": self.state.to_json(), "random": random, "scaler": scaler}
        write_checkpoint(
            self.folder / "checkpoints",
            self.state.step,
            self.fingerprint,
            Checkpoint(self._weights(), tensors, values, state, self.best_file if self.state.best_step else None),
            keep=self.training.keep_checkpoints,
        )

    def _step(self, hooks: Sequence[Hook], stop: bool) -> bool:
        """One step; True when training is to stop after it."""
        started = time.perf_counter()
        step = self.state.step
        held_out = tuple(self.state.held_out_losses)
        multiplier = self.schedule(Progress(step, self.total_steps, self.warmup_steps, held_out))
        rates = [rate * multiplier for rate in self.base_rates]
        examples = self.order.batch(step).tolist()
        try:
            result = self.stepper.step(self.train, examples, rates, stop)
        except DivergedError as error:
            got = f"{error.got} in step {step + 1}, on the examples {', '.join(map(str, examples[:16]))}"
            raise DivergedError(error.what, got=got, hint=error.hint, where=self.train.folder) from None
        seconds = time.perf_counter() - started
        self.state.step += 1
        self.state.tokens += result.tokens
        self.state.supervised += result.supervised
        self.state.loss_sum += result.loss * result.supervised
        self.state.seconds += seconds
        values = {
            "loss": result.loss,
            "lr": max(rates),
            "grad_norm": result.grad_norm,
            "tokens_per_second": result.tokens / seconds,
        }
        for hook in hooks:
            hook.after_step(self.state, values)
        return result.stop

    def _evaluate(self, hooks: Sequence[Hook]) -> None:
        loss = self.held_out_loss()
        if not math.isfinite(loss):
            raise DivergedError(
                "the held-out loss is not a finite number",
                got=f"{loss} after step {self.state.step}",
                hint="lower the learning rate, use precision: fp32, or look at the held-out data",
            )
        if self.state.note_evaluation(loss, self.training.early_stopping) and self.accelerator.is_main_process:
            aside = self.best_file.with_suffix(".tmp")
            save_file(self._weights(), aside)
            aside.replace(self.best_file)
        for hook in hooks:
            hook.after_evaluation(self.state, {"eval_loss": loss})

    @torch.inference_mode()
    def held_out_loss(self) -> float:
        """The mean loss over everything supervised in the held-out corpus, over all processes."""
        assert self.held_out is not None
        self.model.eval()
        device = self.accelerator.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        batches = by_length(self.held_out.lengths(self.objective.size_column), self.eval_batch_size)
        for numbers in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
            batch = self.objective.collate([self.held_out[int(number)] for number in numbers])
            count = self.objective.count(batch)
            with autocast(device, self.precision):
                loss = self.objective.loss(self.unwrapped, {name: t.to(device) for name, t in batch.items()})
            sums += torch.tensor([loss.item(), count], dtype=torch.float64, device=device)
        self.model.train()
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return float(total / count)

    def _evaluation_is_due(self) -> bool:
        every, step = self.training.eval_every, self.state.step
        wanted = step == self.total_steps or (every is not None and step % every == 0)
        return wanted and self.held_out is not None and len(self.held_out) > 0

    def _save_is_due(self, saved_at: float, saved_step: int) -> bool:
        every = self.training.save_every
        if self.state.step >= self.total_steps:
            return False
        if isinstance(every, int):
            return self.state.step - saved_step >= every
        due = time.monotonic() - saved_at >= seconds_of(every)
        if self.accelerator.num_processes > 1:  # clocks differ; the first process decides
            from accelerate.utils import broadcast_object_list

            due = bool(broadcast_object_list([due])[0])
        return due

    def _has_stalled(self) -> bool:
        rule = self.training.early_stopping
        return rule is not None and self.state.evaluations_without_gain >= rule.patience

    @property
    def disposable(self) -> tuple[Path, ...]:
        """What is not needed once the model stands: all that served to resume, unless the best weights are not the last."""
        best_is_last = self.state.best_step in (None, self.state.step)
        return (self.folder / "checkpoints", self.best_file) if best_is_last else ()

    def _settle(self) -> None:
        """Puts the best weights into the model when they are wanted, keeping the last ones in a checkpoint."""
        if self.training.keep == "last" or self.state.best_step in (None, self.state.step):
            return
        if self._saved_step != self.state.step:
            self.save()
        self.accelerator.wait_for_everyone()
        self._load(load_file(self.best_file))

    def _weights(self) -> dict[str, torch.Tensor]:
        """What training changes: trainable parameters, and the buffers that are saved with a model."""
        model = self.unwrapped
        saved = model.state_dict().keys()
        found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        found |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @torch.no_grad()
    def _load(self, weights: dict[str, torch.Tensor]) -> None:
        """Puts back what `_weights` gave."""
        tensors = {**dict(self.unwrapped.named_parameters()), **dict(self.unwrapped.named_buffers())}
        for name, value in weights.items():
            tensors[name].copy_(value)
