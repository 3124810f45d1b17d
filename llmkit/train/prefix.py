"""Training and scoring on top of a frozen prefix whose hidden states are kept: computed once, and then read.

A batch of examples whose states are known begins behind the prefix; any other computes all, to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from llmkit.data.batches import by_length
from llmkit.data.corpus import Corpus, Example
from llmkit.data.states import STATES, StatesWriter
from llmkit.model.objective import Batch, Objective, to_device
from llmkit.model.precision import autocast
from llmkit.model.prefix import Prefix, hidden_of, outputs_at, train_but_still
from llmkit.train.micro_batches import cut

_DEPTH = "prefix_depth"
_TOLERANCE, _TOLERANCE_OF_HALF = 1e-4, 0.05  # of the largest state: rounding
_AT_ONCE = 2048  # tokens of a forward pass that fills the cache, on a CPU
_AT_ONCE_ON_GPU = 16384


@dataclass(frozen=True)
class PrefixObjective:
    """An objective that leaves the prefix out where a batch brings its states."""

    inner: Objective
    prefix: Prefix

    @property
    def why_padded(self) -> str | None:
        """As the objective within says."""
        return self.inner.why_padded

    @property
    def padded(self) -> bool:
        """As the objective within says."""
        return self.inner.padded

    @contextmanager
    def computing(self, *, outline: bool = False) -> Iterator[None]:
        """To be entered around everything that computes with this objective's batches."""
        with self.inner.computing(outline=outline), self.prefix.entered():
            yield

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The batch of the objective within; with `prefix_states`, one row for each position, where all are known."""
        batch = self.inner.collate(examples)
        if any(STATES not in example for example in examples):
            return batch
        (first, dtype, depth), *_ = [example[STATES] for example in examples]
        states = np.zeros((batch["input_ids"].numel(), first.shape[1]), first.dtype)
        for places, example in zip(batch["places"], examples, strict=True):
            states[places] = example[STATES][0]
        return batch | {STATES: torch.from_numpy(states).view(getattr(torch, dtype)), _DEPTH: depth}

    def count(self, batch: Batch) -> int:
        """As the objective within counts."""
        return self.inner.count(batch)

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss of the objective within."""
        with self.behind(batch) as rest:
            return self.inner.loss(model, rest)

    @contextmanager
    def behind(self, batch: Batch) -> Iterator[Batch]:
        """The batch for the objective within; while entered, the states that it brings stand in for the prefix."""
        rest = {name: value for name, value in batch.items() if name not in (STATES, _DEPTH)}
        if STATES not in batch:
            yield rest
            return
        states = batch[STATES].view(*batch["input_ids"].shape, -1)
        with self.prefix.left_out(batch[_DEPTH], states.to(next(self.prefix.model.parameters()).dtype)):
            yield rest


@torch.no_grad()
def try_prefix(
    objective: Objective, model: Any, depth: int, examples: Sequence[Example], precision: str
) -> Prefix | str:
    """A prefix that can be left out, or why it cannot; tried on a few examples of unlike length.

    Their states must be the same alone, together, and while the model trains; and what is behind the prefix must give the
    same loss when it knows nothing but them.
    """
    was_training = model.training
    model.eval()
    try:
        with objective.computing(), autocast(model.device, precision):
            batch = to_device(objective.collate(examples), model.device)
            output = outputs_at(model, [depth], partial(objective.loss, model, batch)).get(depth)
            states = hidden_of(output)
            if not isinstance(states, torch.Tensor) or states.shape[:-1] != batch["input_ids"].shape:
                return "its blocks pass on something else than hidden states"
            states = states.flatten(0, 1)
            expected = objective.loss(model, batch)
            alone = [_of_one(objective, model, depth, example) for example in examples]
            training = _while_training(objective, model, depth, batch)
        together = [states[places] for places in batch["places"]]
        tolerance = _TOLERANCE if states.dtype == torch.float32 else _TOLERANCE_OF_HALF
        if any(_differ(one, other, tolerance) for one, other in zip(alone, together, strict=True)):
            return "the states of an example depend on what is computed beside it"
        if _differ(training, states, 0.0):
            return "something before the last frozen block is random while the model trains"
        known = torch.zeros_like(states)
        for places, own in zip(batch["places"], together, strict=True):
            known[places] = own
        prefix = Prefix(model, depth, len(output) if isinstance(output, tuple) else 0)
        behind = PrefixObjective(objective, prefix)
        with behind.computing(), autocast(model.device, precision):
            found = behind.loss(model, batch | {STATES: known, _DEPTH: depth})
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        return str(error).partition("\n")[0]
    finally:
        model.train(was_training)
    return prefix if torch.allclose(found, expected, rtol=1e-5) else "later blocks use more than what leaves the prefix"


def _of_one(objective: Objective, model: Any, depth: int, example: Example) -> torch.Tensor:
    batch = to_device(objective.collate([example]), model.device)
    states = _rows_at(objective, model, depth, batch)
    return states[batch["places"][0]]


def _while_training(objective: Objective, model: Any, depth: int, batch: Batch) -> torch.Tensor:
    train_but_still(model, depth)
    states = _rows_at(objective, model, depth, batch)
    model.eval()
    return states


def _rows_at(objective: Objective, model: Any, depth: int, batch: Batch) -> torch.Tensor:
    """The states at one depth of one forward pass, a row for each position."""
    found = outputs_at(model, [depth], partial(objective.loss, model, batch))[depth]
    rows: torch.Tensor = hidden_of(found).flatten(0, 1)
    return rows


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    difference = (one.float() - other.float()).abs().max()
    return bool(difference > tolerance * other.float().abs().max())


@torch.no_grad()
def compute_states(
    objective: Objective,
    model: Any,
    corpus: Corpus,
    size_column: str,
    numbers: Sequence[int],
    writers: dict[int, StatesWriter],
    precision: str,
    dtype: torch.dtype | None,
    advance: Callable[[int], None],
) -> None:
    """Writes the states of some examples at the writers' depths, in `dtype` or as they are. Raises OSError."""
    lengths = corpus.lengths(size_column)
    most = _AT_ONCE if model.device.type == "cpu" else _AT_ONCE_ON_GPU
    chosen = np.asarray(numbers)
    was_training = model.training
    model.eval()
    try:
        with objective.computing(), autocast(model.device, precision):
            for some in by_length(lengths[chosen], len(chosen)):
                for part in cut(chosen[some].tolist(), lengths, padded=objective.padded, tokens=most):
                    batch = objective.collate([corpus[number] for number in part])
                    moved = to_device(batch, model.device)
                    found = outputs_at(model, list(writers), partial(objective.loss, model, moved))
                    for depth, writer in writers.items():
                        _write(writer, found[depth], batch, part, dtype)
                    advance(len(part))
    finally:
        model.train(was_training)


def _write(writer: StatesWriter, output: Any, batch: Batch, numbers: list[int], dtype: torch.dtype | None) -> None:
    states = hidden_of(output).flatten(0, 1)
    states = states.to("cpu", dtype or states.dtype)
    name = str(states.dtype).removeprefix("torch.")
    array = (states.view(torch.int16) if states.dtype == torch.bfloat16 else states).numpy()
    for number, places in zip(numbers, batch["places"], strict=True):
        writer.add(number, array[places], name)
