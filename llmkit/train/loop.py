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

from llmkit.data.batches import BatchOrder
from llmkit.data.corpus import Corpus, Example
from llmkit.data.states import CorpusWithStates
from llmkit.errors import DataError, DivergedError, ResourceError
from llmkit.model.objective import Objective
from llmkit.model.prefix import frozen_prefix, train_but_still
from llmkit.optim.schedules import Progress
from llmkit.recipe.training import Training
from llmkit.recipe.values import count_of
from llmkit.run.checkpoint import Checkpoints, Writers
from llmkit.train.divergence import CONSEQUENCE, Trouble, Watch, diverged, losses_of, write_out
from llmkit.train.held_out import held_out_loss
from llmkit.train.hooks import Hook, tell
from llmkit.train.keeping import Keeper
from llmkit.train.local import Meetings
from llmkit.train.masters import Average, Masters
from llmkit.train.micro_batches import Feeder
from llmkit.train.signals import StopRequest
from llmkit.train.state import TrainState
from llmkit.train.step import Stepper, StepResult
from llmkit.train.stream import StreamedExamples
from llmkit.train.thaw import Thaw, Thawing
from llmkit.train.when import ASSUMED_SPEED, Times

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
    describe: Callable[[Example], dict[str, Any]] = lambda example: {}  # for people, as JSON values
    deadline: float | None = None  # of `time.monotonic`: when training has to be over
    save_behind: bool = False  # there is memory for a copy of what is saved
    group_rows: Sequence[tuple[Any, ...]] = ()  # of the groups of parameters, for people
    save_last: bool = False  # the last step too: what comes after it may be stopped as well
    writers: Writers = field(default_factory=Writers)  # of checkpoints
    accepted: Sequence[str] = ()  # fingerprints of other inputs from whose checkpoints to take what fits
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
            Checkpoints(
                self.folder / "checkpoints",
                self.fingerprint,
                training.keep_checkpoints,
                training.keep_every,
                self.accepted,
                self._is_anchor,
                self.writers,
            ),
            self.masters,
            self.optimizer,
            self.average,
            scaler,
            self.warn,
            self.save_behind,
        )
        self.watch = Watch(training.divergence, lambda: self.state)
        self._read_only = [
            corpus for corpus in (self.train, self.held_out) if isinstance(corpus, Corpus | CorpusWithStates)
        ]
        processes, mesh = accelerator.num_processes, self.masters.mesh_among(accelerator)
        rules = training.local if processes > 1 else None
        self.meetings = Meetings(rules, self.masters, self.optimizer, processes) if rules is not None else None
        self.keeper.meetings = self.meetings
        self.thawing = Thawing(self.masters, self.thaws, self.note, self._thawed)
        self.feeder = Feeder(self.train, self.order, self.objective, mesh, training.micro_batch_size)
        self.stepper = Stepper(
            accelerator,
            self.model,
            self.objective,
            self.feeder,
            self.optimizer,
            self.masters,
            mesh,
            self.precision,
            training.max_grad_norm,
            self.warn,
            self.watch.judge,
            scaler,
            apart=self.meetings is not None,
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

        Raises StoppedError or InterruptedByUserError, after saving, when a signal came or time is up; DivergedError;
        ResourceError when checkpoints cannot be written; and ArtifactError when the data change meanwhile.
        """
        self.train_mode()
        nbytes = self.keeper.rehearse()
        self.times = Times(self.training, self.state.step, self.deadline, slowest_save=nbytes / ASSUMED_SPEED)
        self.times.steps_to_a_stop = 1 if self.meetings is None else self.meetings.rules.every
        try:
            with self.masters.computing(self.objective), StopRequest(self._tell_of_stop) as request:
                if self.watch.rolls_back and self.keeper.saved_step is None:
                    self._save(hooks)
                stop = save = False
                while self.state.step < self.total_steps and not self._has_stalled():
                    began = time.monotonic()
                    result = self._step(hooks, request)
                    stop, save = stop or result.stop, save or result.save or self.times.due_by_steps(self.state.step)
                    apart = self._are_apart(result)
                    if not apart and self._evaluation_is_due(result):
                        self._evaluate(hooks)
                    self.times.slowest_step = max(self.times.slowest_step, time.monotonic() - began)
                    if apart:
                        continue
                    if stop:
                        self._stop(hooks, request)
                    if save and self.state.step < self.total_steps:
                        self._save(hooks)
                    save = False
                if any(self.stepper.sum_over_processes([int(request.received is not None)])):  # during the last step
                    self._stop(hooks, request)
        except Exception:  # but not a second Ctrl-C, which stops at once
            self.keeper.collect(wait=True)
            raise
        finally:
            self.feeder.close()
            if isinstance(self.train, StreamedExamples):
                self.train.close()
            for hook in hooks:
                hook.close()
        if self.save_last and self.keeper.saved_step != self.state.step:
            self.keeper.behind = False  # nothing goes on meanwhile, for which to copy all of it
            self._save(hooks)
        self.keeper.settle(self.state, self.training.keep)
        return self.state

    def _are_apart(self, result: StepResult) -> bool:
        """True when the processes hold different weights after this step; lets them meet when that is due."""
        if self.meetings is None or _went_back(result):
            return False
        if not self.meetings.due(self.state.step, self.total_steps):
            return True
        self.meetings.meet()
        return False

    def _stop(self, hooks: Sequence[Hook], request: StopRequest) -> None:
        """Saves, and raises why training stops."""
        if any(self.stepper.sum_over_processes([int(self.keeper.gave_up)])):  # which not all need to know
            raise self.keeper.error()
        self._save_together(hooks)
        raise request.error(self.state.step, in_time=self.times.must_stop())

    def _save_together(self, hooks: Sequence[Hook]) -> None:
        """Saves at once. No process goes on before that is done, or says that it was where it failed in another one.

        Raises ResourceError.
        """
        error = None
        try:
            self._save(hooks, at_once=True)
        except ResourceError as failure:
            error = failure
        if any(self.stepper.sum_over_processes([int(error is not None)])):
            raise error or self.keeper.error(OSError("another process could not write it"))

    def _tell_of_stop(self, name: str) -> None:
        self.note(
            f"{name}: training stops after this step and saves, within about {self.times.bound + 1:.0f} s"
            + ("; Ctrl-C again stops at once, at the last checkpoint" if name == "Ctrl-C" else "")
        )

    def _is_anchor(self, step: int) -> bool:
        """True for a step to roll back to: those are the same whenever a training was stopped in between."""
        every = self.training.save_every
        regular = isinstance(every, int) and step % every == 0
        return self.watch.rolls_back and (regular or any(step == thaw.step for thaw in self.thaws))

    def _save(self, hooks: Sequence[Hook], *, at_once: bool = False) -> None:
        if isinstance(self.train, StreamedExamples) and self.state.step < self.total_steps:
            self.state.stream = self.train.place_of(self.state.batch)

        def before() -> None:
            for hook in hooks:
                hook.before_save()

        waited = self.keeper.save(self.state, at_once=at_once, before=before)
        self.state.save_seconds += waited
        self.times.saved(self.state.step)
        self.times.slowest_save = max(waited, self.keeper.checkpoints.seconds)

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

    def _step(self, hooks: Sequence[Hook], request: StopRequest) -> StepResult:
        """One step, or what the recipe wants in place of one that is in trouble."""
        started = time.perf_counter()
        for corpus in self._read_only:
            corpus.require_unchanged()
        self.keeper.collect()
        if self.keeper.take_failure():
            self.times.failed()
        step, batch = self.state.step, self.state.batch
        if self.watch.rolls_back and self.thawing.is_due(step) and self.keeper.saved_step != step:
            self._save(hooks)  # as what has thawed does not freeze again
        self.thawing.begin(step)
        held_out = tuple(self.state.held_out_losses)
        multiplier = self.schedule(Progress(step, self.total_steps, self.warmup_steps, held_out))
        rates = [rate * multiplier for rate in self.base_rates]
        stop = request.received is not None or self.keeper.gave_up or self.times.must_stop()
        limit = self.state.micro_batch_tokens
        result = self.stepper.step(batch, rates, limit, stop=stop, save=self._saves_by_time())
        self.state.micro_batch_tokens = result.micro_batch_tokens
        if result.trouble is not None and self._refuse(hooks, result, result.trouble):
            return result
        self.watch.note(result.loss)
        self._count(result, time.perf_counter() - started)
        values = {
            "loss": result.loss,
            "lr": max(rates),
            "grad_norm": result.grad_norm,
            "tokens_per_second": result.tokens / (time.perf_counter() - started),
        }
        for hook in hooks:
            hook.after_step(self.state, values)
        return result

    def _saves_by_time(self) -> bool:
        return bool(self.accelerator.is_main_process) and self.times.due_by_time()

    def _count(self, result: StepResult, seconds: float) -> None:
        """Takes a step in that changed the weights."""
        self.state.step += 1
        if self.average is not None:
            self.average.update(self.state.step)
        self.state.tokens += result.tokens
        self.state.computed += result.computed
        self.state.supervised += result.supervised
        self.state.loss_sum += result.loss * result.supervised
        self.state.seconds += seconds

    def _refuse(self, hooks: Sequence[Hook], result: StepResult, trouble: Trouble) -> bool:
        """Does what the recipe says of a step in trouble; False when it is but warned of. Raises DivergedError."""
        step, batch = self.state.step, self.state.batch
        self.warn(f"step {step + 1}: {trouble.why}; {CONSEQUENCE[trouble.action]}")
        if trouble.action == "stop":
            self._give_up(hooks, trouble.why)
        if trouble.action == "warn":
            tell(hooks, self.state, "spike", trouble.why)
            return False
        if trouble.action == "skip":
            self.state.step += 1
            self.state.refused_steps += 1
            tell(hooks, self.state, "skipped", trouble.why)
            return True
        self.keeper.collect(wait=True)
        found = self.keeper.restore(self.warn, anchors=True)
        if found is None:
            self._give_up(hooks, f"{trouble.why}; there is no checkpoint to go back to")
        assert found is not None
        found.refused_steps, found.micro_batch_tokens = self.state.refused_steps + 1, self.state.micro_batch_tokens
        found.passed_over = batch + 1 - found.step
        self.state = found
        self.feeder.forget()
        tell(hooks, self.state, "rolled back", f"step {step + 1}: {trouble.why}")
        return True

    def _give_up(self, hooks: Sequence[Hook], why: str) -> None:
        """Saves what there was before a step, writes its examples out, and raises DivergedError."""
        tell(hooks, self.state, "diverged", why)
        if self.state.step != self.keeper.saved_step and self.meetings is None:  # apart, there is no one state
            self._save_together(hooks)
        step = self.state.step + 1
        file = self.folder / "diverged" / f"step-{step:08d}.json"
        lead = self.accelerator.is_main_process
        if lead or self.masters.sharded:
            about = {"step": step, "why": why, "losses_before": self.state.recent_losses}
            examples = [(number, self.train[number]) for number in self.order.batch(self.state.batch).tolist()]
            losses = losses_of(examples, self.masters, self.objective, self.precision)
        if lead:
            write_out(file, about, examples, losses, self.describe)
        self.accelerator.wait_for_everyone()  # a launcher ends those that are left when one has failed
        raise diverged(f"{why}, in step {step}", file)

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
        loss = held_out_loss(
            self.accelerator,
            self.masters,
            self.objective,
            self.held_out,
            self.size_column,
            self.precision,
            batch_size=self.eval_batch_size,
            tokens=self.state.micro_batch_tokens,
        )
        self.train_mode()
        return loss

    def _evaluation_is_due(self, result: StepResult) -> bool:
        every, step = self.training.eval_every, self.state.step
        wanted = step == self.total_steps or (every is not None and step > 0 and step % every == 0)
        return wanted and not _went_back(result) and self.held_out is not None and len(self.held_out) > 0

    def _has_stalled(self) -> bool:
        rule = self.training.early_stopping
        return rule is not None and self.state.evaluations_without_gain >= rule.patience


def _went_back(result: StepResult) -> bool:
    """True when training is at an earlier step than before."""
    return result.trouble is not None and result.trouble.action == "rollback"


def batch_order(training: Training, lengths: Any, seed: int, *, padded: bool) -> BatchOrder:
    """The global batches that a recipe asks for."""
    size = training.batch_size or (8 if training.batch_tokens is None else None)
    return BatchOrder(lengths, seed, batch_size=size, batch_tokens=training.batch_tokens, by_length=padded)


def total_steps(training: Training, order: BatchOrder) -> int:
    """How many steps a training takes when nothing stops it early."""
    return training.steps or max(1, math.ceil((training.epochs or 1.0) * order.steps_per_epoch))
