"""Muon for the matrices inside the blocks, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import torch
from pydantic import Field

from llmkit.errors import RecipeError
from llmkit.optim import adamw
from llmkit.optim.groups import own_groups
from llmkit.optim.options import Beta, NotNegative


def build(
    groups: Iterable[Mapping[str, Any]],
    *,
    lr: float,
    momentum: Beta = 0.95,
    nesterov: bool = True,
    ns_steps: Annotated[int, Field(gt=0, lt=100)] = 5,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NotNegative = 1e-8,
) -> torch.optim.Optimizer:
    """Muon over the two-dimensional parameters that their groups call `hidden`, AdamW over all others.

    A step of Muon is the momentum with all its singular values made about 1, by `ns_steps` iterations in bfloat16, and
    scaled to the size of a step of AdamW, so that one rate serves both (Liu et al., 2025: https://arxiv.org/abs/2502.16982).
    Both take each group's decoupled `weight_decay` (0 where a group names none). Muon keeps one number a parameter; AdamW
    has `betas` and `eps`, and a fused kernel where the devices have one. Raises RecipeError when nothing is for Muon.
    Jordan et al., 2024: https://kellerjordan.github.io/posts/muon/.
    """
    own: dict[str, list[dict[str, Any]]] = {"muon": [], "adamw": []}
    for group in own_groups(groups):
        for algorithm, part in _split(group).items():
            own[algorithm] += [part] if part["params"] else []
    if not own["muon"]:
        raise RecipeError(
            "`muon` has nothing to do: no matrix inside the blocks is trained",
            expected="a two-dimensional parameter that is not of the embeddings, the head or a norm",
            hint="freeze less, or use adamw",
            where="optimizer",
        )
    settings: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "weight_decay": 0.0}
    parts: dict[str, torch.optim.Optimizer] = {
        "muon": torch.optim.Muon(own["muon"], lr=lr, adjust_lr_fn="match_rms_adamw", **settings)
    }
    if own["adamw"]:
        parts["adamw"] = adamw.build(own["adamw"], lr=lr, betas=betas, eps=eps)
    return MuonWithAdamW(parts)


def _split(group: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A group as one for Muon and one for AdamW, with the same keys; either may be empty."""
    params = group["params"]
    marks = zip(params, group.get("hidden", [False] * len(params)), strict=True)
    for_muon = [hidden and parameter.ndim == 2 for parameter, hidden in marks]
    found = {}
    for algorithm, wanted in (("muon", True), ("adamw", False)):
        found[algorithm] = {**group, "algorithm": algorithm}
        for key in ("params", "names", "hidden"):  # which go together
            if key in group:
                found[algorithm][key] = [item for item, own in zip(group[key], for_muon, strict=True) if own is wanted]
    return found


class MuonWithAdamW(torch.optim.Optimizer):
    """Two optimizers as one: its groups, each with its `algorithm`, and its state are those that they work on."""

    def __init__(self, parts: dict[str, torch.optim.Optimizer]) -> None:
        self._parts = parts
        super().__init__([group for part in parts.values() for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for algorithm, part in self._parts.items():
            part.state = self.state  # load_state_dict replaces both
            part.param_groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            part.step()
        return loss
