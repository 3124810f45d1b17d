"""The training loop, top to bottom: resume, then step, log, evaluate, save, stop.

The order of the data is a function of the seed and the step, and a checkpoint holds all other state, so a training that
was stopped and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmkit.data.batches import BatchOrder, by_length
from llmkit.data.corpus import Corpus
from llmkit.data.states import CorpusWithStates
from llmkit.errors import DataError, DivergedError
from llmkit.model.objective import Objective, to_device
from llmkit.model.precision import autocast
from llmkit.model.prefix import frozen_prefix, train_but_still
from llmkit.optim.schedules import Progress
from llmkit.recipe.training import Training
from llmkit.recipe.values import count_of, seconds_of
from llmkit.train.hooks import Hook
from llmkit.train.keeping import Keeper
from llmkit.train.masters import Average, Masters
from llmkit.train.micro_batches import Feeder, cut_corpus
from llmkit.train.signals import StopRequest
from llmkit.train.state import TrainState
from llmkit.train.step import Stepper
from llmkit.train.stream import StreamedExamples
from llmkit.train.thaw import Thaw, Thawing

Schedule = Callable[[Progress], float]


@dataclass
class Fit:
    """A training: what learns, from what, how, and where it is kept."""

    accelerator: Any
    masters: Masters
    objective: Objective
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    training: Training
    train: Corpus | CorpusWithStates | StreamedExamples
    held_out: Corpus | CorpusWithStates | None
    size_column: str
    seed: int
    precision: str
    folder: Path
    fingerprint: str
    warn: Callable[[str], None]
    frozen_dropout: bool = True  # what stands still computes with dropout too
    thaws: tuple[Thaw, ...] = ()
    note: Callable[[str], None] = lambda text: None
    eval_batch_size: int = 16
    state: TrainState = field(default_factory=TrainState)

    def __post_init__(self) -> None:
        if not isinstance(self.train, StreamedExamples) and not len(self.train):
            raise DataError("there is no example to train on", where=self.train.folder, hint="look at rejected.jsonl")
        accelerator, training = self.accelerator, self.training
        self.model = self.masters.model
        self.order: BatchOrder | StreamedExamples
        if isinstance(self.train, StreamedExamples):
            assert training.steps is not None, "the schema asks for them"
            self.order, self.total_steps = self.train, training.steps
        else:
            lengths = self.train.lengths(self.size_column)
            self.order = batch_order(training, lengths, self.seed, padded=self.objective.padded)
            self.total_steps = total_steps(training, self.order)
        self.warmup_steps = count_of(training.warmup, self.total_steps)
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        scaler = torch.amp.GradScaler(accelerator.device.type) if self.precision == "fp16" else None
        self.average = Average(self.masters, training.ema) if training.ema else None
        self.keeper = Keeper(
            accelerator,
            self.folder,
            self.fingerprint,
            self.masters,
            self.optimizer,
            self.average,
            scaler,
            training.keep_checkpoints,
        )
        self.thawing = Thawing(self.masters, self.thaws, self.note, self._thawed)
        processes, process = accelerator.num_processes, accelerator.process_index
        self.feeder = Feeder(self.train, self.order, self.objective, process, processes, training.micro_batch_size)
        self.stepper = Stepper(
            accelerator,
            self.model,
            self.objective,
            self.feeder,
            self.optimizer,
            self.masters,
            self.precision,
            training.max_grad_norm,
            self.warn,
            scaler,
        )

    def release(self) -> None:
        """Lets go of what only training needs, so that saving and scoring take no memory beside it."""
        self.optimizer.state.clear()
        self.masters.release()

    def resume(self) -> bool:
        """Goes back to the newest checkpoint of this folder, if there is one for the same inputs."""
        most = self.state.micro_batch_tokens
        found = self.keeper.restore(self.warn)
        if found is None:
            return False
        self.state = found
        if isinstance(self.train, StreamedExamples) and found.stream is not None:
            self.train.go_to(found.stream)
        if isinstance(self.training.micro_batch_tokens, int) and most is not None:  # it may have been lowered since
            self.state.micro_batch_tokens = min(most, found.micro_batch_tokens or most)
        return True

    def run(self, hooks: Sequence[Hook]) -> TrainState:
        """Trains to the last step. The model then holds the best weights, or the last, as the recipe says.

        Raises StoppedError or InterruptedByUserError, after saving, when a signal came, and DivergedError.
        """
        self.train_mode()
        saved_at, saved_step = time.monotonic(), self.state.step
        try:
            with self.objective.computing(), StopRequest() as request:
                while self.state.step < self.total_steps and not self._has_stalled():
                    stop = self._step(hooks, request.received is not None)
                    if self._evaluation_is_due():
                        self._evaluate(hooks)
                    if stop or self._save_is_due(saved_at, saved_step):
                        self._save()
                        saved_at, saved_step = time.monotonic(), self.state.step
                    if stop:
                        raise request.error(self.state.step)
                if any(self.stepper.sum_over_processes([int(request.received is not None)])):  # during the last step
                    self._save()
                    raise request.error(self.state.step)
        finally:
            self.feeder.close()
            if isinstance(self.train, StreamedExamples):
                self.train.close()
            for hook in hooks:
                hook.close()
        self.keeper.settle(self.state, self.training.keep)
        return self.state

    def _save(self) -> None:
        if isinstance(self.train, StreamedExamples) and self.state.step < self.total_steps:
            self.state.stream = self.train.place_of(self.state.step)
        self.keeper.save(self.state)

    def train_mode(self) -> None:
        """The model as it trains: with dropout, but for what stands still."""
        if self.frozen_dropout:
            self.model.train()
        else:
            train_but_still(self.model)

    def _thawed(self) -> None:
        """Takes in that more of the model moves."""
        self.feeder.forget()
        for corpus in (self.train, self.held_out):
            if isinstance(corpus, CorpusWithStates):
                corpus.descend(frozen_prefix(self.model))
        self.train_mode()

    def _step(self, hooks: Sequence[Hook], stop: bool) -> bool:
        """One step; True when training is to stop after it."""
        started = time.perf_counter()
        step = self.state.step
        self.thawing.begin(step)
        held_out = tuple(self.state.held_out_losses)
        multiplier = self.schedule(Progress(step, self.total_steps, self.warmup_steps, held_out))
        rates = [rate * multiplier for rate in self.base_rates]
        try:
            result = self.stepper.step(step, rates, self.state.micro_batch_tokens, stop)
        except DivergedError as error:
            examples = self.order.batch(step).tolist()
            got = f"{error.got} in step {step + 1}, on the examples {', '.join(map(str, examples[:16]))}"
            raise DivergedError(error.what, got=got, hint=error.hint, where=self.train.folder) from None
        self.state.step += 1
        if self.average is not None:
            self.average.update(self.state.step)
        seconds = time.perf_counter() - started
        self.state.micro_batch_tokens = result.micro_batch_tokens
        self.state.tokens += result.tokens
        self.state.computed += result.computed
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
        with self.average.applied() if self.average else nullcontext():
            loss = self.held_out_loss()
            is_best = self._note(loss)
            if is_best:
                self.keeper.keep_best()
        for hook in hooks:
            hook.after_evaluation(self.state, {"eval_loss": loss})

    def _note(self, loss: float) -> bool:
        """Takes in a held-out loss; True when it is the best so far. Raises DivergedError."""
        if not math.isfinite(loss):
            raise DivergedError(
                "the held-out loss is not a finite number",
                got=f"{loss} after step {self.state.step}",
                hint="lower the learning rate, use precision: fp32, or look at the held-out data",
            )
        return self.state.note_evaluation(loss, self.training.early_stopping)

    def held_out_loss(self) -> float:
        """The mean loss over everything supervised in the held-out corpus, over all processes."""
        assert self.held_out is not None
        self.model.eval()
        device = self.accelerator.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        lengths, most = self.held_out.lengths(self.size_column), self.state.micro_batch_tokens
        padded, size = self.objective.padded, self.eval_batch_size
        parts = [
            part
            for numbers in by_length(lengths, size)
            for part in cut_corpus(self.held_out, numbers.tolist(), lengths, padded=padded, tokens=most)
        ]
        with torch.inference_mode(), self.objective.computing(), autocast(device, self.precision):
            for numbers in parts[self.accelerator.process_index :: self.accelerator.num_processes]:
                batch = self.objective.collate([self.held_out[int(number)] for number in numbers])
                loss = self.objective.loss(self.model, to_device(batch, device)).item()
                sums += torch.tensor([loss, self.objective.count(batch)], dtype=torch.float64, device=device)
        self.train_mode()
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


def batch_order(training: Training, lengths: Any, seed: int, *, padded: bool) -> BatchOrder:
    """The global batches that a recipe asks for."""
    size = training.batch_size or (8 if training.batch_tokens is None else None)
    return BatchOrder(lengths, seed, batch_size=size, batch_tokens=training.batch_tokens, by_length=padded)


def total_steps(training: Training, order: BatchOrder) -> int:
    """How many steps a training takes when nothing stops it early."""
    return training.steps or max(1, math.ceil((training.epochs or 1.0) * order.steps_per_epoch))
