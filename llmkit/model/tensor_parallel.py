"""The products of a model, cut over processes: by columns, and by rows in the next layer, so that they meet once in a while.

Which ones can be cut is what a family's own plan in Transformers says. Embeddings, norms and the head are not cut.
Shoeybi et al., 2019: https://arxiv.org/abs/1909.08053
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from llmkit.model.anatomy import blocks_of

_COLUMNS, _ROWS, _ALONE = "colwise", "rowwise", "replicated_with_grad_allreduce"
_HEADS = ("num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class TensorPlan:
    """Modules by path. What is `alone` is whole, but sees only its process's part of what it works on."""

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    why_not: str | None = None

    def dimensions(self, model: Any) -> dict[str, int]:
        """Along which dimension each parameter is cut that is."""
        own = {path: dict(model.get_submodule(path).named_parameters()) for path in (*self.columns, *self.rows)}
        cut = {f"{path}.{name}": 0 for path in self.columns for name in own[path]}
        return cut | {f"{path}.weight": 1 for path in self.rows}


def tensor_plan(model: Any, parts: int) -> TensorPlan:
    """How the products of a model's blocks are cut in so many parts; `why_not` says what stands against it."""
    patterns = getattr(model, "tp_plan", None) or {}
    blocks = {id(module) for block in blocks_of(model) for module in block.modules()}
    found: dict[str, list[str]] = {_COLUMNS: [], _ROWS: [], _ALONE: []}
    for path, module in model.named_modules():
        style = patterns.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is None or id(module) not in blocks:
            continue
        if style not in found:
            return TensorPlan(why_not=f"Transformers' plan for {model.config.model_type} has layers that are {style}")
        found[style].append(path)
    if not found[_COLUMNS]:
        return TensorPlan(why_not=f"Transformers has no plan for {model.config.model_type}")
    config = model.config.get_text_config()
    sizes = {name: getattr(config, name, None) for name in _HEADS}
    sizes |= {path: model.get_submodule(path).weight.shape[0] for path in found[_COLUMNS]}
    sizes |= {path: model.get_submodule(path).weight.shape[1] for path in found[_ROWS]}
    for name, size in sizes.items():
        if size is not None and size % parts:
            return TensorPlan(why_not=f"{name} is {size}, which {parts} does not divide")
    return TensorPlan(tuple(found[_COLUMNS]), tuple(found[_ROWS]), tuple(found[_ALONE]))


def parameters_in(model: nn.Module, modules: Iterable[nn.Module]) -> frozenset[str]:
    """The names of all parameters of some of a model's modules."""
    inside = {id(parameter) for module in modules for parameter in module.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in inside)


def cut_products(block: nn.Module, model: nn.Module, plan: TensorPlan, mesh: Any) -> None:
    """Leaves this process of a one-dimensional device mesh its part of a block's weights, as DTensors; all hold the same."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    inside = set(block.modules())
    for paths, style in ((plan.columns, ColwiseParallel), (plan.rows, RowwiseParallel)):
        for module in map(model.get_submodule, paths):
            if module in inside:
                parallelize_module(module, mesh, style(), src_data_rank=None)
