"""What a training is foretold to take is what its own code takes, and micro-batches are sized to what there is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig

from llmkit.model.loading import build_from_config, build_on_meta
from llmkit.model.objective import Objective
from llmkit.model.segments import _kept_bias
from llmkit.recipe.training import Training
from llmkit.stages.sizing import Outline, size_up
from llmkit.tasks.base import Regularisation
from llmkit.tasks.causal import CausalTask
from llmkit.tasks.classify import ClassifyTask
from llmkit.train.masters import Masters
from llmkit.train.memory import _Counter

PLENTY = 10**15
CPU = torch.device("cpu")


def llama(**sizes: Any) -> LlamaConfig:
    given = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    return LlamaConfig(**(given | {"num_attention_heads": 4, "num_key_value_heads": 2} | sizes))


def outline_of(config: Any, lengths: list[int], **changes: Any) -> Outline:
    """A training on made-up examples of these lengths, none beginning as another; keywords are an Outline's or a Training's."""
    own = {name: changes.pop(name) for name in tuple(changes) if name in Outline.__dataclass_fields__}
    task = changes.pop("task", CausalTask)
    examples = [
        {"input_ids": (np.arange(n) + first) % 97, "supervised": np.arange(n) > 0, "label": n % 2}
        for first, n in enumerate(lengths)
    ]
    given: dict[str, Any] = {
        "config": config,
        "auto_class": task.auto_class,
        "frozen": frozenset(),
        "objective": lambda model: task.objective_of(model, 0, Regularisation()),
        "training": Training(**({"epochs": 1, "batch_size": 4} | changes)),
        "examples": examples,
        "lengths": np.array(lengths),
        "seed": 3,
        "precision": "bf16",
        "device": CPU,
    }
    return Outline(**(given | own))


def parts(config: Any, lengths: list[int], **changes: Any) -> Any:
    return size_up(outline_of(config, lengths, **changes), PLENTY).memory


def parameters(config: Any) -> int:
    return sum(p.numel() for p in build_on_meta(config, "AutoModelForCausalLM").parameters())


def test_fixed_parts_in_bf16_and_fp32() -> None:
    count = parameters(llama())
    half, full = parts(llama(), [20] * 8), parts(llama(), [20] * 8, precision="fp32")
    assert (half.masters, half.gradients) == (4 * count, 4 * count)
    assert 2 * count <= half.weights < 2.1 * count, "and the rotary frequencies"
    assert half.optimizer == pytest.approx(8 * count, rel=1e-3)
    assert (full.masters, full.gradients) == (0, 4 * count)
    assert full.weights == pytest.approx(4 * count, rel=0.01)


@pytest.mark.parametrize(
    ("optimizer", "numbers"), [("sgd", 1), ("adagrad", 1), ("rmsprop", 1), ("adamw", 2), ("adafactor", 0.1)]
)
def test_the_optimizer_says_itself_what_it_keeps(optimizer: str, numbers: float) -> None:
    found = parts(llama(), [20] * 8, optimizer=optimizer).optimizer / (4 * parameters(llama()))
    assert found == pytest.approx(numbers, rel=0.02) if numbers >= 1 else found < numbers


def test_frozen_parameters_have_no_gradient_and_no_state() -> None:
    model = build_on_meta(llama(), "AutoModelForCausalLM")
    frozen = frozenset(name for name, _ in model.named_parameters() if "lm_head" not in name)
    found = parts(llama(), [20] * 8, frozen=frozen)
    head = 97 * 64
    assert found.gradients == 4 * head
    assert found.optimizer == pytest.approx(8 * head, rel=1e-3)
    assert found.masters == 4 * parameters(llama()), "fp32 originals of the frozen ones are kept, too"
    assert parts(llama(), [20] * 8, frozen=frozen, exact_in_bf16=True).masters == 4 * head
    whole = parts(llama(), [20] * 8)
    assert found.activations < whole.activations / 3
    assert found.flops < whole.flops / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_those_of_a_real_forward_and_backward(precision: str) -> None:
    """Held against the same count over the same code with real numbers, each with a causal mask of its own."""
    _kept_bias.cache_clear()
    outline = outline_of(llama(), [30, 50, 20, 44], precision=precision)
    foretold = size_up(outline, PLENTY).memory.activations
    model = build_from_config(llama(), "AutoModelForCausalLM", 1)
    objective = outline.objective(model)
    Masters(model, precision)
    batch = objective.collate(list(outline.examples))
    model.train()
    _kept_bias.cache_clear()
    with objective.computing(), _Counter() as counter:
        objective.loss(model, batch).backward()
    assert foretold == pytest.approx(counter.peak, rel=0.1)


def test_flops_are_six_a_parameter_a_token_and_attention() -> None:
    config = llama(hidden_size=256, intermediate_size=1024, vocab_size=1000, num_attention_heads=4)
    memory = parts(config, [32] * 4)
    inside = parameters(config) - 1000 * 256  # all but the embedding, which only looks up
    assert memory.flops / (6 * inside * 4 * 32) == pytest.approx(1, abs=0.1)


def test_checkpointing_takes_less_memory_and_more_operations() -> None:
    config = llama(num_hidden_layers=8)
    plain = parts(config, [60] * 8)
    frugal = parts(config, [60] * 8, activation_checkpointing=True)
    assert frugal.activations < plain.activations / 2
    assert 1.2 < frugal.flops / plain.flops < 1.4


def test_micro_batches_are_sized_to_what_there_is() -> None:
    config, lengths = llama(num_hidden_layers=6), [40] * 64
    whole = size_up(outline_of(config, lengths, batch_size=32), PLENTY)
    assert whole.largest == 32 * 40
    tight = whole.memory.fixed + whole.memory.kernels + whole.memory.activations // 4
    sized = size_up(outline_of(config, lengths, batch_size=32), tight)
    assert sized.memory.total <= tight
    assert 0 < sized.largest <= 32 * 40 // 4 + 40
    assert sized.steps == whole.steps, "the batch stays what it is"
    assert size_up(outline_of(config, lengths, batch_size=32), 1).largest == 40, "one example always"
    given = size_up(outline_of(config, lengths, batch_size=32, micro_batch_tokens=100), 1)
    assert (given.largest, given.micro_batch_tokens) == (80, 100)


def test_memory_is_foretold_for_the_part_that_takes_most_and_operations_for_all() -> None:
    """What comes after the last prediction is not computed: the longest example may be the cheapest."""
    spread = [
        {"input_ids": np.arange(n) % 97, "supervised": (np.arange(n) > 0) & (np.arange(n) <= last)}
        for n, last in ((60, 1), (59, 58))
    ]
    alone = size_up(outline_of(llama(), [59], batch_size=1, examples=spread[1:]), PLENTY)
    both = size_up(outline_of(llama(), [60, 59], batch_size=1, examples=spread), PLENTY)
    assert both.memory.activations >= 0.95 * alone.memory.activations
    assert both.flops >= 0.95 * alone.flops


def test_padding_is_foretold_for_padded_batches_only() -> None:
    config = BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_labels=2
    )
    lengths = list(range(5, 69))
    sized = size_up(outline_of(config, lengths, task=ClassifyTask, batch_size=8), PLENTY)
    assert 0 < sized.padding_share < 0.2
    assert sized.tokens == sum(lengths)
    assert size_up(outline_of(llama(), lengths), PLENTY).padding_share == 0


def test_a_gpu_keeps_no_square_of_the_length() -> None:
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=4096)
    short = parts(config, [512] * 4, device=torch.device("cuda"), batch_size=1).activations
    long = parts(config, [4096] * 4, device=torch.device("cuda"), batch_size=1).activations
    assert long / short == pytest.approx(8, rel=0.1)


def test_the_objective_protocol_is_met() -> None:
    objective: Objective = CausalTask.objective_of(build_on_meta(llama(), "AutoModelForCausalLM"), 0, Regularisation())
    assert objective.padded is False


def test_kernels_are_counted_where_they_are_made() -> None:
    """oneDNN makes one for each shape of a bf16 product on a CPU, and keeps a thousand; else there is none."""
    config = llama()
    alike = parts(config, [40] * 16, precision="bf16", batch_size=4)
    varied = parts(config, list(range(8, 136, 8)), precision="bf16", batch_size=1)
    assert 0 < alike.kernels < varied.kernels <= 2**30
    assert alike.total == alike.fixed + alike.activations + alike.kernels == sum(alike.parts.values())
    assert parts(config, [40] * 16, precision="fp32").kernels == 0
    assert parts(config, [40] * 16, precision="bf16", device=torch.device("cuda")).kernels == 0
