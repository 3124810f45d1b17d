"""Whether a checkpoint is one of this training: looked at before any of it is taken over, as it may come from anywhere."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file

from llmkit.errors import ArtifactError
from llmkit.run.checkpoint import Checkpoint
from llmkit.train.state import TrainState, as_bytes

OUTER = "outer/"  # before the names of weights: the outer optimizer's momentum
_SHAPED = {  # what optimizers remember of each number of a parameter
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "sum",
}


def check_checkpoint(found: Checkpoint, present: Checkpoint, *, same_inputs: bool) -> None:
    """Compares a checkpoint with what one of this training would hold now. Raises ArtifactError.

    One of other inputs need not have the same weights; all else is looked at.
    """
    try:
        _check_state(found)
        _check_random(found.state["random"])
        _check_scaler(found.state.get("scaler"), present.state["scaler"])
        _check_groups(found.optimizer_values, present.optimizer_values, same_inputs=same_inputs)
        if same_inputs:
            both = has_outer(found) and has_outer(present)  # one process alone has no outer optimizer
            weights = [each.weights if both else _without_outer(each) for each in (found, present)]
            _check_tensors("a weight", *weights)
            _check_best(found, present)
        _check_moments(found)
    except ArtifactError:
        raise
    except Exception as error:  # whatever else a made-up document leads to
        raise ArtifactError(
            "its contents are not those of a checkpoint", got=f"{type(error).__name__}: {error}"
        ) from None


def has_outer(checkpoint: Checkpoint) -> bool:
    """True when it has the momentum of the outer optimizer of local steps."""
    return any(name.startswith(OUTER) for name in checkpoint.weights)


def _without_outer(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.weights[name] for name in checkpoint.weights if not name.startswith(OUTER)}


def _check_state(found: Checkpoint) -> None:
    state = found.state.get("state")
    if not isinstance(state, dict) or "step" not in state:
        raise ArtifactError("its state is no state of a training", got=str(state)[:100])
    strange = sorted(map(str, set(state) - {field.name for field in fields(TrainState)}))
    if strange:
        raise ArtifactError("its state has parts that this llmkit does not know", got=", ".join(strange)[:200])
    strict = pydantic_dataclass(TrainState, config=ConfigDict(strict=True, allow_inf_nan=False))
    try:
        strict(**state)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError("its state is of another type", got=f"{place}: {first['msg']}") from None
    negative = [k for k, v in state.items() if isinstance(v, int) and v < 0 and k not in ("best_step", "passed_over")]
    if negative or state["step"] != found.step:
        raise ArtifactError("its state does not add up", got=f"step {state['step']}; negative: {', '.join(negative)}")


def _check_random(processes: Any) -> None:
    if not isinstance(processes, list) or not processes:
        raise ArtifactError("it has no state of random numbers", got=str(processes)[:100])
    for state in processes:
        torch.Generator().set_state(as_bytes(state["torch"]))
        np.random.RandomState().set_state(tuple(state["numpy"]))
        version, internal, gauss = state["python"]
        random.Random().setstate((version, tuple(internal), gauss))
        if "cuda" in state:
            as_bytes(state["cuda"])


def _check_scaler(found: Any, present: Any) -> None:
    if not present and not found:
        return
    if not (isinstance(found, dict) and isinstance(present, dict) and found.keys() == present.keys()):
        raise ArtifactError("its scale of the loss is of another precision", got=str(found)[:100])
    _check_numbers("its scale of the loss is no number", list(found.values()))


def _check_groups(found: dict[str, Any], present: dict[str, Any], *, same_inputs: bool) -> None:
    groups, state = found.get("groups"), found.get("state")
    if not isinstance(groups, list) or not isinstance(state, dict):
        raise ArtifactError("its optimizer has no groups or no state", got=str(groups)[:100])
    if same_inputs and len(groups) != len(present["groups"]):
        raise ArtifactError("its optimizer has other groups", got=str(len(groups)))
    if same_inputs and found.get("kind") != present["kind"]:
        raise ArtifactError("it is of another optimizer", got=str(found.get("kind"))[:100], expected=present["kind"])
    for mine, theirs in zip(present["groups"], groups, strict=False):
        if not isinstance(theirs, dict) or not isinstance(theirs.get("names"), list):
            raise ArtifactError("its optimizer has other groups", got=str(theirs)[:100])
        if not same_inputs:
            continue
        fixed = ("names", "params", "group", "hidden")
        if mine.keys() != theirs.keys() or any(mine.get(key) != theirs.get(key) for key in fixed):
            raise ArtifactError("its optimizer has other groups", got=", ".join(map(str, theirs))[:200])
        for key, value in mine.items():
            if key not in fixed and not _alike(value, theirs[key]):
                raise ArtifactError("an option of its optimizer is of another type", got=f"{key}: {theirs[key]}"[:200])
    _check_numbers("its optimizer remembers what is no number", [v for v in state.values() if v is not None])


def _alike(mine: Any, theirs: Any) -> bool:
    """True for the same type, and for lists of the same length; numbers are finite."""
    if isinstance(mine, list | tuple):
        return isinstance(theirs, list | tuple) and len(mine) == len(theirs) and all(map(_alike, mine, theirs))
    if isinstance(mine, bool) or mine is None or isinstance(mine, str):
        return type(mine) is type(theirs)
    return isinstance(theirs, int | float) and not isinstance(theirs, bool) and math.isfinite(theirs)


def _check_numbers(what: str, values: list[Any]) -> None:
    for value in values:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ArtifactError(what, got=str(value)[:100])


def _check_tensors(what: str, found: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor]) -> None:
    for name in sorted(found.keys() ^ present.keys()):
        raise ArtifactError(f"{what} is missing, or one too many", got=name)
    for name, tensor in found.items():
        if (tensor.shape, tensor.dtype) != (present[name].shape, present[name].dtype):
            raise ArtifactError(f"{what} does not fit the model", got=f"{name}: {tensor.dtype} {tuple(tensor.shape)}")


def _check_best(found: Checkpoint, present: Checkpoint) -> None:
    if found.best_weights is None:
        if found.state["state"].get("best_step"):
            raise ArtifactError("it has no best weights", got="no best.safetensors")
        return
    try:
        best = load_file(found.best_weights)
    except (SafetensorError, MemoryError) as error:
        raise ArtifactError("its best weights are no safetensors file", got=str(error)) from None
    learnt = {name: tensor for name, tensor in present.weights.items() if "/" not in name}
    _check_tensors("one of its best weights", best, learnt)
    for name, tensor in best.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError("its best weights are not finite", got=name)


def _check_moments(found: Checkpoint) -> None:
    """Each parameter of a group has the same moments, of its own shape."""
    names = [(number, name) for number, group in enumerate(found.optimizer_values["groups"]) for name in group["names"]]
    known: dict[int, set[str]] = {}
    for entry in (*found.optimizer_tensors, *found.optimizer_values["state"]):
        number, _, key = entry.partition(".")
        if not (number.isascii() and number.isdigit() and str(int(number)) == number and int(number) < len(names)):
            raise ArtifactError("its optimizer has other parameters", got=entry[:100])
        known.setdefault(int(number), set()).add(key)
    by_group: dict[int, set[str]] = {}
    for number, (group, name) in enumerate(names):
        keys = known.get(number, set())  # none where it stands still yet
        if keys and by_group.setdefault(group, keys) != keys:
            raise ArtifactError("its optimizer lacks something of a parameter", got=name)
        weight = found.weights.get(name)
        for key in keys & _SHAPED:
            moment = found.optimizer_tensors.get(f"{number}.{key}")
            if weight is not None and (
                moment is None or moment.shape != weight.shape or not moment.is_floating_point()
            ):
                raise ArtifactError("its optimizer remembers other shapes", got=f"{name}, {key}")
