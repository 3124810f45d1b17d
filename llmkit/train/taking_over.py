"""What of a checkpoint of other inputs fits a training: for `--resume-anyway`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from llmkit.run.checkpoint import Checkpoint

_OF_THE_DATA = (
    "eval_loss",
    "best_loss",
    "best_step",
    "loss_to_beat",
    "evaluations_without_gain",
    "recent_losses",
    "stream",
)


def fitting_parts(found: Checkpoint, present: Checkpoint, tell: Callable[[str], None]) -> Checkpoint:
    """`found` with what does not fit replaced by what is `present`; `tell` is told what was taken and what was not.

    Weights and moments are matched by name and shape. Step, counts and random state are taken over; what is the best so
    far is not, as it may have been measured on other data.
    """
    weights = _matching(found.weights, present.weights)
    moments, values = _moments(found, present)
    taken = sorted(name for name in weights if weights[name] is not present.weights[name])
    missing = sorted(present.weights.keys() - set(taken))
    ignored = sorted(found.weights.keys() - set(taken))
    moved = 0 if moments is present.optimizer_tensors else len(moments)
    tell(
        f"taken over from step {found.state['state']['step']} of other inputs: {len(taken)} of {len(present.weights)} "
        f"weights, {moved} of {len(found.optimizer_tensors)} tensors of the optimizer, the step, the random state"
    )
    if missing:
        tell(f"not in the checkpoint, so as the parent has them: {_some(missing)}")
    if ignored:
        tell(f"in the checkpoint, but not learnt here or of another shape: {_some(ignored)}")
    state = found.state["state"] | {key: present.state["state"][key] for key in _OF_THE_DATA}
    about = found.state | {"state": state, "scaler": found.state["scaler"] if present.state["scaler"] else None}
    return replace(
        found, weights=weights, optimizer_tensors=moments, optimizer_values=values, state=about, best_weights=None
    )


def _matching(found: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    def better(name: str, tensor: torch.Tensor) -> torch.Tensor:
        own = found.get(name)
        return tensor if own is None or (own.shape, own.dtype) != (tensor.shape, tensor.dtype) else own

    return {name: better(name, tensor) for name, tensor in present.items()}


def _moments(found: Checkpoint, present: Checkpoint) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's state, by the names of its parameters; groups keep the options that they have now."""
    old, new = _numbers(found), _numbers(present)
    if _kind(found) != _kind(present):
        return present.optimizer_tensors, present.optimizer_values
    shared = [name for name in new if name in old and _same_shape(name, found, present)]
    numbers = {str(old[name]): new[name] for name in shared}

    def renumbered(entries: Mapping[str, Any]) -> dict[str, Any]:
        parts = [(*name.partition("."), value) for name, value in entries.items()]
        return {f"{numbers[number]}.{key}": value for number, _, key, value in parts if number in numbers}

    values = renumbered(found.optimizer_values["state"])
    return renumbered(found.optimizer_tensors), present.optimizer_values | {"state": values}


def _numbers(checkpoint: Checkpoint) -> dict[str, int]:
    names = [name for group in checkpoint.optimizer_values["groups"] for name in group["names"]]
    return {name: number for number, name in enumerate(names)}


def _kind(checkpoint: Checkpoint) -> tuple[Any, set[str]]:
    """What tells one optimizer from another: its class, and the options of its groups."""
    values = checkpoint.optimizer_values
    return values.get("kind"), {option for group in values["groups"] for option in group}


def _same_shape(name: str, found: Checkpoint, present: Checkpoint) -> bool:
    return name in found.weights and found.weights[name].shape == present.weights[name].shape


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
