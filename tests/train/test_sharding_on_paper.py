"""Who holds what in a training of many processes, with a process group that is none and a model without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from llmkit.model.loading import build_on_meta
from llmkit.train.masters import Masters
from llmkit.train.mesh import Mesh
from llmkit.train.sharding import ShardedMasters

CONFIG = LlamaConfig(  # Llama 3 8B with 4 of its 32 blocks
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=4,
    num_attention_heads=32,
    num_key_value_heads=8,
)


@contextmanager
def process(number: int, of: int, tensor: int = 1, context: int = 1) -> Iterator[ShardedMasters]:
    """What a process holds."""
    distributed.init_process_group("fake", store=FakeStore(), rank=number, world_size=of)
    try:
        yield ShardedMasters(build_on_meta(CONFIG, "AutoModelForCausalLM"), "bf16", Mesh(number, of, tensor, context))
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def whole() -> Masters:
    return Masters(build_on_meta(CONFIG, "AutoModelForCausalLM"), "fp32")


@pytest.mark.parametrize("processes", [64, 1024])
def test_each_process_holds_its_rows_of_everything(processes: int, whole: Masters) -> None:
    for number in (0, 1, processes // 2, processes - 1):
        with process(number, processes) as masters:
            for name, weight in whole.weights.items():
                rows = -(-len(weight) // processes)
                mine = max(0, min(rows, len(weight) - number * rows))
                assert masters.weights[name].shape == (mine, *weight.shape[1:]), name
                assert masters.rows(name, weight).shape == masters.weights[name].shape, "so is it cut that is resumed"
            held = sum(weight.numel() for weight in masters.weights.values())
            assert held <= 1.01 * len(whole.gradients) / processes
            assert len(masters.gradients) == held


@pytest.mark.parametrize(("processes", "context"), [(8, 1), (64, 1), (64, 4), (1024, 16)])
def test_eight_that_share_products_hold_their_part(processes: int, context: int, whole: Masters) -> None:
    for number in (0, 3, processes - 1):
        with process(number, processes, 8, context) as masters:
            shared = masters.context()
            assert (shared.number, shared.count) == (number // 8 % context, context)
            assert distributed.get_process_group_ranks(shared.group) == [
                number - 8 * (shared.number - other) for other in range(context)
            ]
            for name, weight in whole.weights.items():
                assert masters.weights[name].shape == masters.rows(name, weight).shape, "so is it cut that is resumed"
            shape = masters.weights["model.layers.2.self_attn.o_proj.weight"].shape
            assert shape == (4096 // (processes // 8), 512), "by columns over eight, by rows over the others"
            held = sum(weight.numel() for weight in masters.weights.values())
            assert held <= 1.01 * len(whole.gradients) / processes
            assert len(masters.gradients) == held


def test_the_layout_of_a_checkpoint_knows_of_no_processes(whole: Masters) -> None:
    with process(5, 256) as masters:
        found = {name: (tensor.shape, tensor.dtype) for name, tensor in masters.outlines().items()}
    assert found == {name: (tensor.shape, tensor.dtype) for name, tensor in whole.outlines().items()}
    assert all(dtype == torch.float32 for _, dtype in found.values())
