"""Faster stand-ins for a model's modules, for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

Choice = Callable[[nn.Module], nn.Module | None]  # what a module is to be replaced by, or None


@contextmanager
def replaced_modules(model: nn.Module, choose: Choice) -> Iterator[int]:
    """While entered, modules are those that `choose` gives for them; gives their number.

    A stand-in shares its parameters with what it stands for, and hands back whether the model is training.
    """
    stand_ins = {
        module: found.train(module.training)
        for module in model.modules()
        if module is not model and (found := choose(module)) is not None
    }
    swapped = [
        (model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], module)
        for path, module in model.named_modules(remove_duplicate=False)
        if module in stand_ins
    ]
    for parent, name, module in swapped:
        setattr(parent, name, stand_ins[module])
    try:
        yield len(stand_ins)
    finally:
        for parent, name, module in swapped:
            setattr(parent, name, module.train(stand_ins[module].training))
