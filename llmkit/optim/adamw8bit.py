"""AdamW with moments of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from llmkit.optim.groups import own_groups
from llmkit.optim.packages import need


def build(
    groups: Iterable[Mapping[str, Any]], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.Optimizer:
    """AdamW over parameter groups, each with its own decoupled `weight_decay` (0 where a group names none).

    Two bytes a parameter and two scales for every 256 of them, in place of eight bytes. 32 bits remain for what a group
    does not call `hidden` (the paper advises it for embeddings), and for tensors of fewer than 4,096 values. Needs the
    package bitsandbytes, which has kernels for CPUs and GPUs; raises RecipeError without it, and ValueError for an option
    out of range. Dettmers et al., 2021: https://arxiv.org/abs/2110.02861.
    """
    library = need("adamw8bit", "bitsandbytes.optim", "bitsandbytes", since=(0, 50))  # the first with CPU kernels
    optimizer: torch.optim.Optimizer = _with_plain_state(library.AdamW8bit)(
        own_groups(groups), lr=lr, betas=betas, eps=eps, weight_decay=0.0
    )
    return optimizer


def _with_plain_state(base: Any) -> Any:
    """The optimizer with a state of tensors and numbers only: bitsandbytes nests it, and repeats constant tables."""

    class AdamW8bit(base):
        def state_dict(self) -> dict[str, Any]:
            found = super().state_dict()
            found["state"] = {number: _flat(entries) for number, entries in found["state"].items()}
            return dict(found)

        def load_state_dict(self, state_dict: Mapping[str, Any], move_to_device: bool = True) -> None:
            tables = {"qmap1": self.name2qmap["dynamic"], "qmap2": self.name2qmap["udynamic"]}
            state = {
                number: {**entries, **tables} if "absmax1" in entries else entries
                for number, entries in state_dict["state"].items()
            }
            super().load_state_dict({**state_dict, "state": state}, move_to_device)

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config = super().get_config(gindex, pindex, group)
            return {**config, "optim_bits": 8 if "hidden" not in group or group["hidden"][pindex] else 32}

    return AdamW8bit


def _flat(entries: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in entries.items():
        found |= value if isinstance(value, dict) else {key: value}
    return {key: value for key, value in found.items() if not key.startswith("qmap")}
