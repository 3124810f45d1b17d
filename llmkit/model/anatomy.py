"""Anatomy: where a model's embeddings, blocks, norms and head are, read from its structure rather than its family.

- The **head** is what lies outside the base model (or the output embeddings, where the model has no separate base).
- **Blocks** are the items of the outermost lists of composite layers that hold most parameters.
- **Embeddings** are everything on the way into the first block, and the tables that every block reads.
- **Final** is what follows the blocks: norms, poolers, output projections.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

SMALLEST_STACK = (
    0.05  # of the parameters of the largest; a shorter list is a front end (convolutions before the blocks)
)


@dataclass(frozen=True)
class Anatomy:
    """Parameter names by place: each is in exactly one of `embeddings`, `blocks`, `final` and `head`."""

    embeddings: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    final: tuple[str, ...]
    head: tuple[str, ...]
    norms: tuple[str, ...]  # every norm's parameters, wherever they stand
    tied: dict[str, tuple[str, ...]]  # name in named_parameters() -> the other names of the same tensor
    tied_head: tuple[str, ...]  # the head's names for tensors that are counted elsewhere, such as lm_head.weight
    stacks: tuple[tuple[str, int], ...]  # name and number of blocks, in the order of `blocks`

    def tensors(self, names: Iterable[str]) -> set[str]:
        """The names in named_parameters() of the tensors that some names stand for."""
        listed = {alias: name for name, aliases in self.tied.items() for alias in aliases}
        return {listed.get(name, name) for name in names}

    def frozen_prefix(self, frozen: Collection[str]) -> int:
        """How many leading blocks of the first stack are frozen, together with all that leads into them."""
        if not self.stacks or not set(self.embeddings) <= set(frozen):
            return 0
        first = self.blocks[: self.stacks[0][1]]
        return next((number for number, block in enumerate(first) if not set(block) <= set(frozen)), len(first))


@dataclass(frozen=True)
class _Stack:
    path: str
    blocks: nn.ModuleList

    @property
    def parent(self) -> str:
        return self.path.rpartition(".")[0]


def read_anatomy(model: nn.Module) -> Anatomy:
    """Where everything is in a Transformers model, which may be on the meta device.

    Encoder-decoders have two stacks, numbered through: first the encoder's blocks, then the decoder's.
    """
    base_path = _base_path(model)
    output_path = _output_path(model)
    stacks = _stacks(model, base_path)
    entry = _entry_modules(model, stacks, base_path)
    norm_ids = {id(tensor) for module in model.modules() if _is_norm(module) for tensor in module.parameters(False)}

    names: dict[int, list[str]] = defaultdict(list)  # the first is the one that named_parameters() lists
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    starts = _block_starts(stacks)
    blocks: list[list[str]] = [[] for _ in starts]
    embeddings, final, head, tied_head = [], [], [], []
    for name, *others in names.values():
        inside = [alias for alias in (name, *others) if _is_within(alias, base_path) and _owner(alias) != output_path]
        if not inside:
            head.append(name)
            continue
        tied_head += [alias for alias in (name, *others) if alias not in inside]
        numbers = [number for alias in inside if (number := _block_of(alias, starts)) is not None]
        if any(_owner(alias) in entry for alias in inside):
            embeddings.append(name)
        elif numbers:
            blocks[min(numbers)].append(name)
        else:
            final.append(name)
    return Anatomy(
        embeddings=tuple(embeddings),
        blocks=tuple(tuple(block) for block in blocks),
        final=tuple(final),
        head=tuple(head),
        norms=tuple(name for name, parameter in model.named_parameters() if id(parameter) in norm_ids),
        tied={aliases[0]: tuple(aliases[1:]) for aliases in names.values() if len(aliases) > 1},
        tied_head=tuple(tied_head),
        stacks=_stack_names(model, stacks),
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks themselves, in the order of `Anatomy.blocks`."""
    return [block for stack in _stacks(model, _base_path(model)) for block in stack.blocks]


def entry_modules(model: nn.Module) -> list[nn.Module]:
    """What leads into the blocks: embeddings with their norms and dropout, the tables that every block reads."""
    base_path = _base_path(model)
    stacks = _stacks(model, base_path)
    entry = {
        path
        for path in _entry_modules(model, stacks, base_path)
        if not any(_is_within(stack.path, path) for stack in stacks)
    }
    return [module for path, module in model.named_modules() if path in entry]


def _base_path(model: nn.Module) -> str:
    """The path of the base model; empty when the model is its own base."""
    base = getattr(model, "base_model", model)
    return next(path for path, module in model.named_modules() if module is base)


def _output_path(model: nn.Module) -> str | None:
    """The path of the output embeddings, unless they are the very module that embeds the input."""
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    if outputs is None or outputs is _input_embeddings(model):
        return None
    return next((path for path, module in model.named_modules() if module is outputs), None)


def _stacks(model: nn.Module, base_path: str) -> list[_Stack]:
    """The outermost lists of blocks, encoder first."""
    found: list[_Stack] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not _is_within(path, base_path):
            continue
        if not any(_is_within(path, stack.path) for stack in found) and _holds_blocks(module):
            found.append(_Stack(path, module))
    largest = max((_scalars(stack.blocks) for stack in found), default=0)
    found = [stack for stack in found if _scalars(stack.blocks) >= SMALLEST_STACK * largest]
    if _is_encoder_decoder(model):
        found.sort(key=lambda stack: "decoder" in stack.path.split("."))  # stable
    return found


def _holds_blocks(modules: nn.ModuleList) -> bool:
    """Blocks are composite (attention and a feed-forward layer, say) and alike in class or in what they hold."""
    composite = all(sum(bool(list(part.parameters(False))) for part in block.modules()) > 1 for block in modules)
    classes = {type(block) for block in modules}
    shapes = [{tuple(tensor.shape) for tensor in block.parameters()} for block in modules]
    return len(modules) > 0 and composite and (len(classes) == 1 or bool(set.intersection(*shapes)))


def _entry_modules(model: nn.Module, stacks: list[_Stack], base_path: str) -> set[str]:
    """The paths of the modules outside the blocks that lead into them or that every block reads.

    Whatever is not known to follow the blocks counts as leading into them: a mistake then costs an optimisation (a
    prefix of frozen blocks that is not recognised) and never a wrong result.
    """
    inputs = _input_embeddings(model)
    order = {path: index for index, (path, _) in enumerate(model.named_modules())}
    tables = _shared_tables(model, stacks, inputs, order)
    entry: set[str] = set()
    for path, module in model.named_modules():
        if not _is_within(path, base_path) or any(_is_within(path, stack.path) for stack in stacks):
            continue
        stack = max(stacks, key=lambda stack: _shared_depth(stack.path, path), default=None)
        after = stack is not None and order[path] > order[stack.path]
        own_name = path.rpartition(".")[2]
        follows = after or "final" in own_name or _leaves_width(module, inputs)
        embeds = isinstance(module, nn.Embedding) or "embed" in path.removeprefix(base_path).lower()
        reads_table = any(_is_within(path, parent) and order[path] >= start for parent, start in tables.items())
        if module is inputs or embeds or reads_table or not follows:
            entry.add(path)
    return entry


def _leaves_width(module: nn.Module, inputs: nn.Module | None) -> bool:
    """Whether a projection brings the hidden size back to the embeddings' narrower width."""
    width = inputs.embedding_dim if isinstance(inputs, nn.Embedding) else None
    return isinstance(module, nn.Linear) and width is not None and module.out_features == width != module.in_features


def _shared_tables(
    model: nn.Module, stacks: list[_Stack], inputs: nn.Module | None, order: dict[str, int]
) -> dict[str, int]:
    """By parent of a stack: the place in `order` of an embedding that is declared after the blocks.

    Such a table (relative positions in DeBERTa or MPNet) is read by every block, through what is declared after it.
    """
    tables: dict[str, int] = {}
    for stack in stacks:
        for name, child in model.get_submodule(stack.parent).named_children():
            place = order.get(f"{stack.parent}.{name}".lstrip("."), -1)
            if place > order[stack.path] and isinstance(child, nn.Embedding) and child is not inputs:
                tables.setdefault(stack.parent, place)
    return tables


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None


def _ancestors(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _shared_depth(path: str, other: str) -> int:
    """How many leading components two paths share."""
    pairs = zip(path.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _owner(parameter_name: str) -> str:
    return parameter_name.rpartition(".")[0]


def _is_within(path: str, ancestor: str) -> bool:
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")


def _scalars(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.parameters())


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _block_starts(stacks: list[_Stack]) -> dict[str, int]:
    """The path of each block -> its number, counted through all stacks."""
    paths = [f"{stack.path}.{index}" for stack in stacks for index in range(len(stack.blocks))]
    return {path: number for number, path in enumerate(paths)}


def _block_of(name: str, starts: dict[str, int]) -> int | None:
    return next((starts[path] for path in _ancestors(name) if path in starts), None)


def _stack_names(model: nn.Module, stacks: list[_Stack]) -> tuple[tuple[str, int], ...]:
    if _is_encoder_decoder(model) and len(stacks) == 2:
        return (("encoder", len(stacks[0].blocks)), ("decoder", len(stacks[1].blocks)))
    return tuple((stack.path, len(stack.blocks)) for stack in stacks)
