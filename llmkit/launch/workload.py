"""What a recipe's training is, without the machine: sizes of the model, and what its own code takes on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from llmkit.launch.scale import Workload
from llmkit.model.anatomy import read_anatomy
from llmkit.model.loading import build_on_meta, longest_input
from llmkit.recipe.schema import Recipe
from llmkit.recipe.training import Training
from llmkit.run.directory import Run
from llmkit.stages.pipeline import run_stages
from llmkit.stages.plan import OneLength, has_data, outline_of
from llmkit.stages.sizing import Outline, size_up
from llmkit.train.loop import batch_order, total_steps
from llmkit.train.memory import Memory

_NO_LIMIT = 10**18  # bytes
_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Planned:
    """A workload, how many tokens the recipe trains on, where that is known, and where the batch comes from."""

    work: Workload
    tokens: float | None
    batch_from: str
    checkpointing: bool  # the recipe asks for it
    micro_batch: int | None  # that the recipe asks for


def read_workload(recipe: Recipe, run: Run, stage: str, ranks: int) -> Planned:
    """The training of a stage, of real data where the recipe has any, else of sequences as long as may be.

    A recipe that names no batch and has no data gets a sequence for each of the ranks, and 8 at least.
    """
    training: Training = getattr(recipe, stage)
    precision = "bf16" if training.precision == "auto" else training.precision
    if has_data(recipe):
        run_stages(recipe, run, "preprocess")
    anywhere = recipe.model_copy(update={stage: training.model_copy(update={"precision": "auto"})})
    outline, corpus = outline_of(anywhere, run, stage)
    outline = replace(outline, device=torch.device("cuda"), precision=precision)
    lengths = outline.lengths if corpus is not None else _within_reach(outline)
    named = bool(training.batch_size or training.batch_tokens)
    length = math.ceil(float(lengths.mean()))
    order = batch_order(training, lengths, recipe.seed, padded=False)
    steps = total_steps(training, order)
    if corpus is not None:
        batch = training.batch_size or max(1, round((training.batch_tokens or 8 * length) / length))
        tokens: float | None = steps * float(lengths.sum()) / order.steps_per_epoch
        batch_from = "the recipe and its data"
    elif named:
        batch, batch_from = len(lengths), "the recipe"
        tokens = float(training.steps * batch * length) if training.steps else None
    else:
        batch, batch_from = max(8, ranks), f"a guess, for {ranks} GPUs: the recipe names none"
        tokens = float(training.steps * batch * length) if training.steps else None
    work = measure(outline, length, batch, float(lengths.max()) / length)
    return Planned(work, tokens, batch_from, training.activation_checkpointing, training.micro_batch_size)


def _within_reach(outline: Outline) -> np.ndarray:
    """The lengths of made-up examples, no longer than the model can take."""
    longest = longest_input(outline.config, None)
    return outline.lengths if longest is None else np.minimum(outline.lengths, longest)


def measure(outline: Outline, length: int, batch: int, longest: float) -> Workload:
    """The workload of `batch` sequences of `length` tokens, the longest of them `longest` lengths."""
    plain, again = (_memory_of_one(outline, length, checkpointing) for checkpointing in (False, True))
    model = build_on_meta(outline.config, outline.auto_class)
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    anatomy = read_anatomy(model)
    blocks = max(1, len(anatomy.blocks))
    text = outline.config.get_text_config()
    hidden, heads = int(text.hidden_size), int(getattr(text, "num_attention_heads", 1))
    key_value_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    wide = int(getattr(text, "head_dim", None) or hidden // heads)  # numbers a head
    stream = length * hidden * _BYTES[outline.precision]
    kept, outside = _divided(plain.activations, again.activations, blocks, stream)
    return Workload(
        precision=outline.precision,
        length=length,
        batch=batch,
        longest=longest,
        blocks=blocks,
        heads=heads,
        key_value_heads=key_value_heads,
        parameters=sum(numbers.values()),
        in_blocks=sum(numbers[name] for block in anatomy.blocks for name in block if name in numbers),
        weights=plain.weights,
        masters=plain.masters,
        gradients=plain.gradients,
        optimizer=plain.optimizer,
        stream=stream,
        keys_and_values=2 * length * key_value_heads * wide * _BYTES[outline.precision],
        kept=kept,
        outside=outside,
        flops=plain.flops,
        recomputed_flops=again.flops - plain.flops,
        attention_flops=12 * blocks * heads * wide * length**2,
    )


def _memory_of_one(outline: Outline, length: int, checkpointing: bool) -> Memory:
    """What the engine takes for one sequence on one GPU."""
    changes: dict[str, Any] = {
        "activation_checkpointing": checkpointing,
        "batch_size": 1,
        "batch_tokens": None,
        "micro_batch_size": None,
        "micro_batch_tokens": "auto",
        "epochs": None,
        "steps": 1,
    }
    training = outline.training.model_copy(update=changes)
    one = replace(outline, training=training, examples=OneLength(length), lengths=np.full(1, length))
    return size_up(one, _NO_LIMIT).memory


def _divided(plain: int, again: int, blocks: int, stream: float) -> tuple[float, float]:
    """What a block keeps, and what is beside the blocks, from the peaks without and with activation checkpointing.

    Without, all blocks' and what is beside them are there at once; with, one stream a block, and the larger of the two.
    """
    beside = max(0.0, again - blocks * stream)
    return max(0.0, plain - beside) / blocks, beside
