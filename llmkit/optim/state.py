"""An optimizer's state as what can be saved without pickling: named tensors and JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def optimizer_to_parts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors and JSON values: `3.exp_avg` is of parameter number 3."""
    state = optimizer.state_dict()
    tensors, values = {}, {}
    for number, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                own = value.detach().cpu().contiguous()
                tensors[f"{number}.{key}"] = own if own.ndim else own.clone()  # a step counted on the CPU goes on
            else:
                values[f"{number}.{key}"] = value
    groups = [{k: v for k, v in group.items() if not isinstance(v, torch.Tensor)} for group in state["param_groups"]]
    return tensors, {"kind": type(optimizer).__name__, "state": values, "groups": groups}


def optimizer_from_parts(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], values: dict[str, Any]
) -> None:
    """Puts back what `optimizer_to_parts` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *values["state"].items()]:
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    now = optimizer.state_dict()["param_groups"]
    groups = [current | saved for current, saved in zip(now, values["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
