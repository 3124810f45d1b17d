"""Parameter groups: which trainable parameters decay, and which are matrices inside the model."""

from __future__ import annotations

from typing import Any

import torch

from llmkit.errors import RecipeError
from llmkit.model.anatomy import read_anatomy


def parameter_groups(model: torch.nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: `decay`, and `no_decay` for vectors, scalars and norms.

    Each group has `params`; `names` and `hidden` in the same order; `group`, `lr` and `weight_decay`. An empty one is left
    out. `hidden` is True for what has two dimensions or more and is of no embedding, head or norm: some optimizers have
    a way of their own for these. Frozen parameters are in neither group, so that the optimizer keeps no state for them.
    Decay shrinks what multiplies an activation; a bias or a norm's gain has nothing to shrink towards zero
    (https://arxiv.org/abs/1711.05101). Raises RecipeError when nothing is trainable.
    """
    anatomy = read_anatomy(model)
    norms, ends = set(anatomy.norms), {*anatomy.embeddings, *anatomy.head}
    members: dict[str, list[tuple[str, torch.nn.Parameter]]] = {"decay": [], "no_decay": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members["no_decay" if parameter.ndim < 2 or name in norms else "decay"].append((name, parameter))
    if not any(members.values()):
        raise RecipeError(
            "no parameter is trainable",
            expected="at least one parameter that moves",
            hint="freeze less",
            where="freeze",
        )
    return [
        {
            "group": group,
            "params": [parameter for _, parameter in pairs],
            "names": [name for name, _ in pairs],
            "hidden": [group == "decay" and name not in ends for name, _ in pairs],
            "lr": lr,
            "weight_decay": weight_decay if group == "decay" else 0.0,
        }
        for group, pairs in members.items()
        if pairs
    ]
