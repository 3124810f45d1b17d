"""How much memory a training takes on this machine, and how many tokens it can compute at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.data.batches import BatchOrder
from llmkit.data.corpus import Example
from llmkit.model.adapters import AdapterRules, add_adapters
from llmkit.model.anatomy import blocks_of
from llmkit.model.groups import Rates, parameter_groups
from llmkit.model.loading import build_on_meta
from llmkit.model.objective import Objective, sizes
from llmkit.optim import build_optimizer
from llmkit.recipe.training import Training
from llmkit.train.loop import batch_order, total_steps
from llmkit.train.masters import Masters
from llmkit.train.memory import Memory, predict_memory
from llmkit.train.micro_batches import cut
from llmkit.train.zero import Zero

_MOST_ON_CPU = 2048  # tokens at once; more are not faster there
_STEPS_LOOKED_AT = 4000
_MOST_KERNELS = 1024  # that oneDNN keeps
_KERNEL_BYTES = 1_400_000  # seen on the shipped recipes, with what the heap loses around them
_SHARE_OF_MEMORY = 0.9  # the rest is for what is not foreseen: fragments, libraries' workspaces


@dataclass(frozen=True)
class Outline:
    """A training without its weights: what is known before a model is loaded.

    `objective` makes the task's objective of a model; `frozen` names the parameters that stand still.
    """

    config: Any
    auto_class: str
    frozen: frozenset[str]
    objective: Callable[[Any], Objective]
    training: Training
    examples: Sequence[Example]
    lengths: np.ndarray
    seed: int
    precision: str
    device: torch.device
    exact_in_bf16: bool = False  # the weights come from bf16, so that no fp32 originals of frozen ones are kept
    processes: int = 1
    shards: int = 1  # processes over which the parameters are spread
    zero: Zero | None = None  # what else is spread over the processes
    adapter: AdapterRules | None = None

    def model(self) -> Any:
        """The model on the meta device."""
        model = build_on_meta(self.config, self.auto_class)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in self.frozen)
        if self.adapter is not None:
            add_adapters(model, self.adapter, self.frozen)
        shape_computation(model, self.training, compiled=False)
        return model


@dataclass(frozen=True)
class Sizing:
    """What a training takes. `largest` is the most tokens of a micro-batch, padding included."""

    memory: Memory
    micro_batch_tokens: int | None
    largest: int
    padding_share: float
    order: BatchOrder
    steps: int
    tokens: int
    flops: float  # over the whole training


def size_up(outline: Outline, available: int) -> Sizing:
    """Sizes micro-batches to `available` bytes, unless the recipe does, and foretells what they take."""
    training, model = outline.training, outline.model()
    objective = outline.objective(model)
    order = batch_order(training, outline.lengths, outline.seed, padded=objective.padded)
    steps = total_steps(training, order)
    limit = training.micro_batch_tokens
    most = limit if limit != "auto" else (_MOST_ON_CPU if outline.device.type == "cpu" else None)
    parts = _parts(order, steps, outline, objective, most)
    part, memory = _fullest_and_its_memory(outline, model, objective, parts)
    while limit == "auto" and memory.total > available and len(part) > 1:
        most = max(1, int(_tokens(part, order.lengths, objective) * _share_that_fits(memory, available)))
        model = outline.model()
        objective = outline.objective(model)
        parts = _parts(order, steps, outline, objective, most)
        part, memory = _fullest_and_its_memory(outline, model, objective, parts)
    looked_at = max(1.0, steps / _STEPS_LOOKED_AT)
    tokens = sum(int(order.lengths[part].sum()) for part in parts) * looked_at
    padded = sum(_tokens(part, order.lengths, objective) for part in parts) * looked_at
    largest = max(_tokens(part, order.lengths, objective) for part in parts)
    flops = memory.flops / _computed(part, outline, objective) * _share_computed(parts, outline, objective) * padded
    return Sizing(memory, most, largest, 1 - tokens / padded, order, steps, int(tokens), flops)


def available_bytes(device: torch.device) -> int:
    """The memory that a training may fill: most of the device's, or of what this process may use of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * _SHARE_OF_MEMORY)
    import psutil

    limits = [psutil.virtual_memory().total]
    group = Path("/sys/fs/cgroup/memory.max")
    if group.is_file() and (text := group.read_text().strip()).isdigit():
        limits.append(int(text))
    return int(min(limits) * _SHARE_OF_MEMORY)


def shape_computation(model: Any, training: Training, *, compiled: bool = True) -> None:
    """Trades time for memory, or a slow start for speed, as the recipe says."""
    if training.activation_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if training.compile and compiled:
        for block in blocks_of(model):
            block.compile(dynamic=True)


def _memory(outline: Outline, model: Any, objective: Objective, part: list[int]) -> Memory:
    """What one micro-batch takes; consumes the model."""
    batch = objective.collate([outline.examples[number] for number in part])
    training = outline.training
    groups = parameter_groups(model, Rates(1e-5), weight_decay=training.weight_decay)

    def optimizer(masters: Masters) -> torch.optim.Optimizer:
        name, options = training.optimizer.name, training.optimizer.options
        return build_optimizer(name, masters.adopt(groups), lr=1e-5, options=options)

    copies = outline.device.type == "cpu" and not outline.exact_in_bf16
    memory = predict_memory(model, objective, batch, outline.precision, outline.device, copies, optimizer)
    if outline.zero is not None:
        offloaded = outline.zero.offload and outline.device.type != "cpu"
        return memory.zero(outline.zero, copied=outline.precision == "bf16", offloaded=offloaded)
    if outline.shards == 1:
        return memory
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    numbers = sum(p.numel() for p in model.parameters())
    together = numbers - sum(blocks) + 2 * max(blocks)  # the block that computes, the next one, and what is in no block
    return memory.spread(outline.shards, numbers, together * (2 if outline.precision == "bf16" else 4))


def _fullest_and_its_memory(
    outline: Outline, model: Any, objective: Objective, parts: list[list[int]]
) -> tuple[list[int], Memory]:
    """The micro-batch that computes most, and what training takes with it; consumes the model."""
    part = _fullest(parts, outline, objective)
    memory = _memory(outline, model, objective, part)
    return part, replace(memory, kernels=_kernels(memory.products, parts, outline, objective))


def _kernels(products: int, parts: list[list[int]], outline: Outline, objective: Objective) -> int:
    """The bytes of what oneDNN makes and keeps for bf16 products, one for each shape."""
    if outline.device.type != "cpu" or outline.precision != "bf16":
        return 0
    lengths = {(len(part) * objective.padded, _tokens(part, outline.lengths, objective) // 8) for part in parts}
    return min(_MOST_KERNELS, products * len(lengths)) * _KERNEL_BYTES


def _share_that_fits(memory: Memory, available: int) -> float:
    """How much smaller a micro-batch has to be; never so small that a wrong forecast would do harm."""
    return max(0.05, 0.95 * (available - memory.fixed - memory.kernels) / memory.activations)


def _parts(order: BatchOrder, steps: int, outline: Outline, objective: Objective, most: int | None) -> list[list[int]]:
    """The micro-batches of the first steps, in all processes."""
    return [
        part
        for step in range(min(steps, _STEPS_LOOKED_AT))
        for process in range(outline.processes)
        for part in cut(
            order.batch(step)[process :: outline.processes].tolist(),
            order.lengths,
            padded=objective.padded,
            tokens=most,
            examples=outline.training.micro_batch_size,
        )
    ]


def _tokens(part: list[int], lengths: np.ndarray, objective: Objective) -> int:
    """The tokens of a micro-batch, padding included."""
    own = lengths[part]
    return int(own.max() * len(part) if objective.padded else own.sum())


def _computed(part: list[int], outline: Outline, objective: Objective) -> int:
    """The positions that a micro-batch really computes: less than its tokens where beginnings are shared."""
    return sizes(objective.collate([outline.examples[number] for number in part]))[1]


def _fullest(parts: list[list[int]], outline: Outline, objective: Objective) -> list[int]:
    """The micro-batch that computes most, of those with most tokens."""
    candidates = nlargest(16, parts, key=lambda part: _tokens(part, outline.lengths, objective))
    return max(candidates, key=lambda part: _computed(part, outline, objective))


def _share_computed(parts: list[list[int]], outline: Outline, objective: Objective) -> float:
    """The computed positions in all tokens, from micro-batches spread over the training."""
    sample = [parts[number] for number in np.unique(np.linspace(0, len(parts) - 1, 32).astype(int))]
    tokens = sum(_tokens(part, outline.lengths, objective) for part in sample)
    return sum(_computed(part, outline, objective) for part in sample) / tokens
