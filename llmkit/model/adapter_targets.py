"""Which linear layers get adapters: those of the blocks that do not stand still, of attention, of the rest, or all."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmkit.errors import RecipeError
from llmkit.model.anatomy import blocks_of, read_anatomy
from llmkit.model.parts import blocks_named, some_of

_ATTENTION = re.compile(r"Attention|Attn")


@dataclass(frozen=True)
class AdapterRules:
    """What a recipe says of adapters. `targets` are attention, mlp or all; `blocks` those that get adapters, None for
    all that do not stand still; `start` is a folder with an adapter to go on from.
    """

    name: str = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str = "all"
    blocks: str | None = None
    start: Path | None = None


def targets_in(model: Any, rules: AdapterRules, frozen: Collection[str]) -> tuple[str, ...]:
    """The paths of the linear layers that adapters are to stand beside. Raises RecipeError when there are none."""
    chosen, modules = _in_target(model, rules, frozen)
    found = tuple(path for path, _, module in modules if is_linear(module))
    if not found:
        others = some_of(list(not_adapted(model, rules, frozen)))
        raise RecipeError(
            "there is nothing to put adapters beside",
            got=f"no linear layer of `{rules.targets}` in {some_of([f'block {n}' for n in chosen]) or 'any block'}",
            expected="targets: attention, mlp or all, in blocks that do not stand still",
            hint=f"adapters stand beside linear layers alone, which hold none of {others}" if others else None,
            where="adapter",
        )
    return found


def not_adapted(model: Any, rules: AdapterRules, frozen: Collection[str] = ()) -> dict[str, int]:
    """The matrices of the target that no linear layer holds, which get no adapters: experts in one tensor, routers.

    By their path within a block, the numbers in all blocks that get adapters. To be asked before adapters are added.
    """
    found: dict[str, int] = {}
    for _, inner, module in _in_target(model, rules, frozen)[1]:
        if not is_linear(module) and not isinstance(module, torch.nn.Embedding):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    path = f"{inner}.{name}".lstrip(".")
                    found[path] = found.get(path, 0) + parameter.numel()
    return found


def _in_target(
    model: Any, rules: AdapterRules, frozen: Collection[str]
) -> tuple[list[int], list[tuple[str, str, Any]]]:
    """The blocks that get adapters, and the modules of the target in them: path, path within the block, module."""
    anatomy, blocks = read_anatomy(model), blocks_of(model)
    still = {number for number, names in enumerate(anatomy.blocks) if frozen and set(names) <= set(frozen)}
    wanted = blocks_named(rules.blocks, anatomy, "adapter") if rules.blocks is not None else None
    if wanted is not None and still & set(wanted):
        raise RecipeError(
            "adapters are asked for in blocks that stand still",
            got=f"blocks {', '.join(map(str, sorted(still & set(wanted))))}",
            expected="blocks that `freeze` does not name",
            where="adapter.blocks",
        )
    chosen = [number for number in (range(len(blocks)) if wanted is None else wanted) if number not in still]
    inside = {id(module): path for number in chosen for path, module in blocks[number].named_modules()}
    of_attention = {
        id(part)
        for module in model.modules()
        if id(module) in inside and _ATTENTION.search(type(module).__name__)
        for part in module.modules()
    }
    parts = {True: ("all", "attention"), False: ("all", "mlp")}
    return chosen, [
        (path, inside[id(module)], module)
        for path, module in model.named_modules()
        if id(module) in inside and rules.targets in parts[id(module) in of_attention]
    ]


def is_linear(module: Any) -> bool:
    """True for linear layers, GPT-2's among them."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
