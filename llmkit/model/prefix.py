"""The frozen prefix of a model: leading blocks of which training needs nothing but the hidden states that leave them.

At depth d, these are the states between block d - 1 and what follows it. Where they are known, everything before is left
out of a forward pass. Nothing is believed of a family: a prefix is tried on the model itself before it is relied on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llmkit.files import digest_json
from llmkit.model.anatomy import blocks_of, entry_modules, read_anatomy
from llmkit.model.replacement import replaced_modules

# What of a config changes nothing before the head, or only while training
_NOT_OF_THE_PREFIX = ("label", "drop", "_name_or_path", "architectures", "version", "dtype", "cache", "bos_", "eos_")


def frozen_prefix(model: nn.Module, held: Collection[str] = ()) -> int:
    """How many leading blocks of the first stack stand still, together with all that leads into them.

    What is in `held` counts as frozen too.
    """
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad or name in held}
    return read_anatomy(model).frozen_prefix(frozen)


def still_modules(model: nn.Module, depth: int | None = None) -> tuple[str, ...]:
    """The paths of what stands still as a whole: frozen blocks, and with a frozen prefix what leads into it.

    With a `depth`, as if so many blocks and what leads into them stood still.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    frozen = [block for block in blocks_of(model) if not any(p.requires_grad for p in block.parameters())]
    blocks = frozen if depth is None else blocks_of(model)[:depth]
    entry = entry_modules(model) if depth or frozen_prefix(model) else []
    return tuple(paths[id(module)] for module in [*entry, *blocks])


def train_but_still(model: nn.Module, depth: int | None = None) -> None:
    """Puts a model into training, but for its `still_modules`, which compute as in evaluation."""
    model.train()
    for path in still_modules(model, depth):
        model.get_submodule(path).eval()


def hidden_of(output: Any) -> Any:
    """The hidden states in what a block gives: that itself, or the first of several things."""
    return output[0] if isinstance(output, tuple) else output


def prefix_digest(model: Any, depth: int) -> str:
    """SHA-256 over what decides the states at a depth: the weights before it, as they compute, and the config."""
    anatomy, parameters = read_anatomy(model), dict(model.named_parameters())
    before = [*anatomy.embeddings, *(name for block in anatomy.blocks[:depth] for name in block)]
    digest = hashlib.sha256()
    for name, tensor in [*((name, parameters[name]) for name in before), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    config = {k: v for k, v in model.config.to_dict().items() if not any(part in k for part in _NOT_OF_THE_PREFIX)}
    return digest_json([depth, type(model.base_model).__name__, config, digest.hexdigest()])


class _ReachedError(Exception):
    """A forward pass has come as far as it has to."""


@torch.no_grad()
def outputs_at(model: Any, depths: Sequence[int], forward: Callable[[], Any]) -> dict[int, Any]:
    """What blocks give at some depths of one forward pass, which goes no further than the deepest."""
    blocks, deepest = blocks_of(model), max(depths)
    found: dict[int, Any] = {}

    def take(depth: int) -> Callable[[Any, Any, Any], None]:
        def hook(block: Any, inputs: Any, output: Any) -> None:
            found[depth] = output
            if depth == deepest:
                raise _ReachedError

        return hook

    handles = [blocks[depth - 1].register_forward_hook(take(depth)) for depth in depths]
    try:
        forward()
    except _ReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


class Prefix:
    """The first `deepest` blocks of a model, all of which or some can be left out when the states after them are known.

    `parts` is the number of things that a block gives, of which the states are the first; 0 when it gives them alone.
    """

    def __init__(self, model: Any, deepest: int, parts: int = 0) -> None:
        self.model, self.deepest, self.parts = model, deepest, parts
        self.depth = 0  # blocks that are left out now
        self.states: torch.Tensor | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """While entered, the prefix can be left out; the model's parameters keep their names."""
        numbers = {block: number for number, block in enumerate(blocks_of(self.model)[: self.deepest])}

        def choose(module: nn.Module) -> nn.Module | None:
            return _Block(module, self, numbers[module]) if module in numbers else None

        with replaced_modules(self.model, choose):
            yield

    @contextmanager
    def left_out(self, depth: int, states: torch.Tensor) -> Iterator[None]:
        """While entered, forward passes begin with the states after `depth` blocks."""
        self.depth, self.states = depth, states
        try:
            yield
        finally:
            self.depth, self.states = 0, None


class _Block(nn.Module):
    """Stands for a block of the prefix: computes as that does, unless the states that leave the prefix are known."""

    def __init__(self, block: nn.Module, prefix: Prefix, number: int) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = block._modules, block._parameters, block._buffers
        self.__dict__.update(block=block, prefix=prefix, number=number)  # the block is not to be a module within

    def __getattr__(self, name: str) -> Any:
        """What the block has: models ask their blocks for the kind of their attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """The block's output."""
        if self.number >= self.prefix.depth:
            return self.block(*arguments, **named)
        given = arguments[0] if arguments else named["hidden_states"]
        hidden = self.prefix.states if self.number == self.prefix.depth - 1 else given
        return (hidden, *[None] * (self.prefix.parts - 1)) if self.prefix.parts else hidden
