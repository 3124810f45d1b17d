"""What is foretold of clusters holds against the papers' formulas and against what others published of their runs."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from published import FITTED, OTHERS, SAME_TABLE, Run, fsdp, llama, transformer
from transformers import LlamaConfig

from llmkit.errors import ResourceError, UsageError
from llmkit.launch.chips import CHIPS, find_chip
from llmkit.launch.choose import SIMPLER, Options, choose, compare, nodes_that_do
from llmkit.launch.scale import (
    LARGEST_ERROR,
    MEDIAN_ERROR,
    RUNS,
    Assumptions,
    Cluster,
    Estimate,
    Layout,
    days,
    estimate,
)
from llmkit.launch.volumes import (
    all_gather,
    all_reduce,
    bubble,
    context_parallel,
    data_parallel,
    hybrid,
    pipeline_parallel,
    tensor_parallel,
)
from llmkit.launch.workload import measure
from llmkit.recipe.training import Training
from llmkit.stages.sizing import Outline
from llmkit.tasks.base import Regularisation
from llmkit.tasks.causal import CausalTask

H100, A100 = find_chip("h100"), find_chip("a100")


def cluster(nodes: int = 2, gpus: int = 8, chip: Any = H100) -> Cluster:
    return Cluster(chip, nodes, gpus, chip.network_rate)


def test_rings_send_what_the_formulas_say() -> None:
    """Counted: in each of n - 1 rounds every rank passes one of n parts on, until each has all parts."""
    ranks, size = 6, 6 * 5
    held = [{rank} for rank in range(ranks)]
    sent = [0] * ranks
    for step in range(ranks - 1):
        for rank in range(ranks):
            part = (rank - step) % ranks
            assert part in held[rank]
            held[(rank + 1) % ranks].add(part)
            sent[rank] += size // ranks
    assert all(len(parts) == ranks for parts in held)
    assert set(sent) == {all_gather(size, ranks)}
    assert all_reduce(size, ranks) == 2 * all_gather(size, ranks)
    assert all_gather(size, 1) == 0


@pytest.mark.parametrize(("stage", "numbers"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_zero_sends_two_numbers_a_parameter_and_three_when_weights_are_shared_out(stage: int, numbers: int) -> None:
    """Rajbhandari et al., 2020, section 7: 2 psi, 2 psi, 2 psi and 3 psi, here with the ring's (n - 1) / n."""
    psi, ranks = 7.5e9, 64
    assert data_parallel(2 * psi, 2 * psi, ranks, stage) == pytest.approx(numbers * 2 * psi * (ranks - 1) / ranks)


def test_accumulation_repeats_what_each_stage_has_to_repeat() -> None:
    once = {stage: data_parallel(2.0, 4.0, 8, stage) for stage in range(4)}
    four = {stage: data_parallel(2.0, 4.0, 8, stage, micro_batches=4) for stage in range(4)}
    assert four[0] == once[0]
    assert four[1] == once[1]
    assert four[2] == pytest.approx(7 / 8 * (4 * 4 + 2))
    assert four[3] == pytest.approx(4 * once[3])


def test_hybrid_sharding_sends_little_between_nodes() -> None:
    inside, between = hybrid(2.0, 4.0, shard=8, replicas=4)
    assert inside == data_parallel(2.0, 4.0, 8, 3)
    assert between == pytest.approx(2 * 4 / 8 * 3 / 4)


def test_tensor_and_pipeline_parallelism_send_what_megatron_says() -> None:
    """Narayanan et al., 2021, section 3.2: 8 b s h (t - 1) / t numbers a block, b s h between stages and back."""
    b, s, h, t = 4, 2048, 12288, 8
    assert tensor_parallel(b * s * h, t) == 8 * b * s * h * (t - 1) / t
    assert tensor_parallel(b * s * h, t, recomputed=True) == 12 * b * s * h * (t - 1) / t
    assert pipeline_parallel(b * s * h) == 2 * b * s * h
    assert bubble(8, 64) == 7 / 64
    assert bubble(8, 64, interleave=4) == 7 / 256


def test_context_parallelism_sends_keys_and_values_round() -> None:
    assert context_parallel(100.0, 4) == 3 * 75
    assert context_parallel(100.0, 4, recomputed=True) == 4 * 75


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_takes_the_memory_of_its_figure_one(stage: int, gigabytes: float) -> None:
    """7.5 billion parameters on 64 GPUs, 2 + 2 + 12 bytes each."""
    psi = 7.5e9
    work = replace(
        llama("8b", 128, 64),
        parameters=int(psi),
        in_blocks=int(psi),
        weights=2 * psi,
        gradients=2 * psi,
        masters=4 * psi,
        optimizer=8 * psi,
        kept=0.0,
        stream=0.0,
        outside=0.0,
    )
    found = estimate(work, cluster(8), Layout("ZeRO", data=64, zero=stage))
    states = {name: value for name, value in found.memory.items() if name not in ("gathered", "activations")}
    assert sum(states.values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_what_is_sent_is_the_sum_of_the_formulas() -> None:
    work = llama("8b", 8192, 64)
    found = estimate(work, cluster(), Layout("fsdp x tensor", data=8, zero=3, tensor=2), checkpointing=True)
    share = work.in_blocks / work.parameters / 2 + 1 - work.in_blocks / work.parameters
    assert found.micro_batches == 8
    assert found.sent["tensor"] == pytest.approx(8 * 32 * tensor_parallel(8192 * 4096 * 2, 2, recomputed=True))
    assert found.sent["weights and gradients"] == pytest.approx(
        data_parallel(work.weights * share, work.gradients * share, 8, 3, micro_batches=8)
    )


def test_one_gpu_sends_nothing_and_is_never_faster_than_its_products() -> None:
    work = llama("8b", 8192, 8)
    found = estimate(work, cluster(1, 1), Layout("one GPU"))
    assert not found.sent
    assert found.seconds["products"] == pytest.approx(8 * work.model_flops / 794.5e12)
    assert 0.4 < found.mfu < 794.5 / 989


def test_rates_within_and_between_machines() -> None:
    assumed = Assumptions(links=1.0)
    two = cluster(2)
    assert two.rate(1, 8, assumed) == 450e9
    assert two.rate(1, 16, assumed) == 8 * 50e9, "all eight ports carry the ring on"
    assert two.rate(8, 2, assumed) == 50e9, "one port, where one GPU of a machine takes part"
    mesh = cluster(1, 8, find_chip("mi300x"))
    assert mesh.rate(1, 8, assumed) == 448e9
    assert mesh.rate(1, 2, assumed) == 64e9
    assert two.hops(1, 8) == 0
    assert cluster(4).hops(1, 32) == 3


def test_idle_ranks_are_counted() -> None:
    found = estimate(llama("8b", 8192, 8), cluster(2), fsdp(16))
    assert found.idle == 8
    assert found.tokens_per_second == pytest.approx(
        estimate(llama("8b", 8192, 16), cluster(2), fsdp(16)).tokens_per_second / 2
    )


@pytest.mark.parametrize(
    "run", [pytest.param(run, id=f"{run.source}-{run.gpus}x{run.chip}") for run in [*OTHERS, *SAME_TABLE]]
)
def test_published_runs_are_foretold_within_the_largest_error(run: Run) -> None:
    assert abs(run.error()) <= LARGEST_ERROR + 0.005, run.foretold().seconds


def test_the_errors_that_are_printed_are_those_that_are_found() -> None:
    errors = [abs(run.error()) for run in OTHERS]
    assert len(errors) == RUNS
    assert statistics.median(errors) == pytest.approx(MEDIAN_ERROR, abs=0.005)
    assert max(errors) == pytest.approx(LARGEST_ERROR, abs=0.005)
    fitted = [abs(run.error()) for run in FITTED]
    assert len(fitted) == 40
    assert max(abs(run.error()) for run in SAME_TABLE) < 0.12, "on several nodes, where the fit saw one"
    assert statistics.median(fitted) < 0.07
    assert max(fitted) < 0.38


def test_sharding_over_more_gpus_frees_what_torchtitan_saw() -> None:
    """8B on 8 and on 128 GPUs: 82.4 and 67.0 GiB (benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3)."""
    few, many = (run.foretold().peak_memory for run in OTHERS if run.source == "torchtitan" and run.chip == "h100")
    assert (few - many) / 2**30 == pytest.approx(82.4 - 67.0, rel=0.05)


def test_the_engine_says_of_a_llama_what_the_papers_say() -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 1000}
    config = LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096)
    outline = Outline(
        config=config,
        auto_class="AutoModelForCausalLM",
        frozen=frozenset(),
        objective=lambda model: CausalTask.objective_of(model, 0, Regularisation()),
        training=Training(batch_size=1),
        examples=[],
        lengths=np.full(1, 1024),
        seed=3,
        precision="bf16",
        device=torch.device("cuda"),
    )
    found = measure(outline, 1024, 4, 1.0)
    said = transformer(
        6, 512, 8, 1024, 4, vocabulary=1000, feed_forward=1408, gated=True, key_value_heads=4
    )  # and norms, which are small
    assert found.parameters == pytest.approx(said.parameters, rel=1e-3)
    assert found.in_blocks == pytest.approx(said.in_blocks, rel=1e-3)
    for part in ("weights", "masters", "gradients", "optimizer"):
        assert getattr(found, part) == pytest.approx(getattr(said, part), rel=2e-3), part
    assert found.stream == said.stream
    assert found.keys_and_values == said.keys_and_values
    assert found.attention_flops == said.attention_flops
    assert found.flops == pytest.approx(said.flops, rel=0.01)
    assert found.recomputed_flops == pytest.approx(said.recomputed_flops, rel=0.35), (
        "the last product is not made again"
    )
    assert found.kept == pytest.approx(said.kept, rel=0.35)


def test_auto_takes_the_simplest_of_those_that_are_about_as_fast() -> None:
    found = compare(llama("8b", 8192, 64), cluster(2), Options())
    chosen, why = choose(found)
    fastest = min(one.step_seconds for one in found if one.fits and one.layout.considered)
    assert chosen.fits
    assert chosen.step_seconds <= (1 + SIMPLER) * fastest
    earlier = found[: found.index(chosen)]
    assert not any(one.fits and one.step_seconds <= (1 + SIMPLER) * fastest for one in earlier)
    assert "fit" in why


def test_a_small_model_needs_no_sharding() -> None:
    small = transformer(12, 768, 12, 1024, 512)
    assert choose(compare(small, cluster(1), Options()))[0].layout.name == "ddp"


def test_what_llmkit_does_not_run_is_not_taken() -> None:
    found = [one for one in compare(llama("8b", 8192, 64), cluster(2), Options()) if not one.layout.considered]
    assert any(one.fits for one in found)
    with pytest.raises(ResourceError, match="fits with no strategy"):
        choose(found)


def test_more_nodes_are_found_where_nothing_fits() -> None:
    work, few = llama("70b", 8192, 64), cluster(2)
    with pytest.raises(ResourceError):
        choose(compare(work, few, Options()))
    found = nodes_that_do(work, few, Options())
    assert found is not None
    nodes, best = found
    assert nodes == 4
    assert best.fits
    assert best.layout.ranks == 32


def test_the_recipe_settles_checkpointing_and_micro_batches() -> None:
    work = llama("8b", 8192, 64)
    found: list[Estimate] = compare(work, cluster(2), Options(checkpointing=True, micro_batch=1))
    assert {one.checkpointing for one in found} == {True}
    assert {one.micro_batch for one in found} == {1}


def test_every_layout_uses_all_gpus() -> None:
    for one in compare(llama("70b", 8192, 64), cluster(4), Options()):
        assert one.layout.ranks == 32, one.layout


def test_days() -> None:
    assert days(86400e6, 1e6) == 1.0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("h100", "h100"), ("H100-SXM", "h100"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"),
        ("a100", "a100"), ("NVIDIA A100-SXM4-40GB", "a100-40gb"), ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("rtx4090", "rtx-4090"), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("AMD Instinct MI300X OAM", "mi300x"),
    ],
)  # fmt: skip
def test_gpus_are_found_as_people_and_drivers_write_them(text: str, name: str) -> None:
    assert find_chip(text).name == name


def test_an_unknown_gpu_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        find_chip("mi30x")
    assert caught.value.hint == "did you mean `mi300x`?"
    assert "h200" in str(caught.value.expected)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_facts_of_gpus_have_sources_and_make_sense(chip: Any) -> None:
    assert chip.sources
    assert all(source.startswith("https://") for source in chip.sources)
    assert chip.peak["fp32"] < chip.peak["bf16"]
    assert chip.peak.get("fp8", 2 * chip.peak["bf16"]) == pytest.approx(2 * chip.peak["bf16"], rel=0.02)
    assert 0.3 < chip.matmul / chip.peak["bf16"] < 1.1
    assert chip.product_rate("bf16") <= chip.peak["bf16"]
    assert chip.network_rate <= chip.link_rate
