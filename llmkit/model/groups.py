"""Parameter groups: which trainable parameters decay, which are matrices inside the model, and at which rate each learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmkit.errors import Problem, RecipeError, raise_all
from llmkit.model.anatomy import Anatomy, read_anatomy
from llmkit.model.parts import Parts, resolve_parts, some_of


@dataclass(frozen=True)
class RateRule:
    """A peak rate for parts of a model: `lr`, or `lr_scale` times the rate that they would have."""

    parts: Parts
    lr: float | None = None
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Rates:
    """The peak rates of a training.

    With `layer_decay` d, what is n blocks below the head learns at d^n of `lr`: the last block at d, the first of L at d^L,
    the embeddings at d^(L + 1) (Clark et al., 2020: https://arxiv.org/abs/2003.10555). `rules` come on top.
    """

    lr: float
    layer_decay: float = 1.0
    rules: Sequence[RateRule] = ()


def parameter_groups(model: torch.nn.Module, rates: Rates, *, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable parameters: `decay`, and `no_decay` for vectors, scalars and norms, by rate.

    Each group has `params`; `names` and `hidden` in the same order; `group`, `lr` and `weight_decay`. An empty one is left
    out. `hidden` is True for what has two dimensions or more and is of no embedding, head or norm: some optimizers have
    a way of their own for these. Frozen parameters are in no group, so that the optimizer keeps no state for them.
    Decay shrinks what multiplies an activation; a bias or a norm's gain has nothing to shrink towards zero
    (https://arxiv.org/abs/1711.05101). Raises RecipeError when nothing is trainable, and for rules that match nothing,
    match what stands still, or match the same parameter.
    """
    anatomy = read_anatomy(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise RecipeError(
            "no parameter is trainable",
            expected="at least one parameter that moves",
            hint="freeze less",
            where="freeze",
        )
    norms, ends = set(anatomy.norms), {*anatomy.embeddings, *anatomy.head}
    of = _rates_by_name(model, anatomy, rates, set(trainable))
    members: dict[tuple[str, float, str], list[str]] = {}
    for kind in ("decay", "no_decay"):
        for name, parameter in trainable.items():
            if (parameter.ndim < 2 or name in norms) == (kind == "no_decay"):
                part, lr = of[name]
                members.setdefault((part, lr, kind), []).append(name)
    return [
        {
            "group": f"{part}, {kind}" if part else kind,
            "params": [trainable[name] for name in names],
            "names": names,
            "hidden": [kind == "decay" and name not in ends for name in names],
            "lr": lr,
            "weight_decay": weight_decay if kind == "decay" else 0.0,
        }
        for (part, lr, kind), names in members.items()
    ]


def _rates_by_name(
    model: torch.nn.Module, anatomy: Anatomy, rates: Rates, trainable: set[str]
) -> dict[str, tuple[str, float]]:
    """Each trainable parameter -> the part that has its rate, and the rate."""
    found = dict.fromkeys(trainable, ("", rates.lr))
    if rates.layer_decay != 1:
        found = {name: (part, rates.lr * rates.layer_decay**n) for name, (part, n) in _heights(anatomy).items()}
    ruled: dict[str, str] = {}
    problems: list[Problem] = []
    for number, rule in enumerate(rates.rules):
        where = f"rates.{number}"
        matches, more = resolve_parts(rule.parts, anatomy, [name for name, _ in model.named_parameters()], where)
        problems += more
        what = ", ".join(matches)
        named = anatomy.tensors(name for _, covered in matches.values() for name in covered)
        moving = named & trainable
        if not moving and not more:
            problems.append(Problem(f"`{what}` stands still, so that it has no rate", where=where, hint="leave it out"))
        if twice := sorted(moving & ruled.keys()):
            problems.append(
                Problem(f"`{what}` and `{ruled[twice[0]]}` give two rates", some_of(twice), "one for each", where=where)
            )
        for name in moving:
            ruled[name] = what
            found[name] = (what, rule.lr if rule.lr is not None else found[name][1] * rule.lr_scale)
    raise_all(problems)
    return found


def _heights(anatomy: Anatomy) -> dict[str, tuple[str, int]]:
    """Each parameter -> its part, and how many blocks below the head it is; each stack counts its own."""
    found = dict.fromkeys([*anatomy.final, *anatomy.head], ("head", 0))
    number = deepest = 0
    for name, blocks in anatomy.stacks:
        for left in range(blocks, 0, -1):
            label = f"{name} block {blocks - left}" if len(anatomy.stacks) > 1 else f"block {number}"
            found |= dict.fromkeys(anatomy.blocks[number], (label, left))
            number += 1
        deepest = max(deepest, blocks)
    return found | dict.fromkeys(anatomy.embeddings, ("embeddings", deepest + 1))
