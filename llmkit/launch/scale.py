"""What a training takes on many GPUs, by how it is shared: memory a rank, bytes sent, time a step. Plain arithmetic.

What a block keeps, computes and holds comes from `Workload`, which the engine's own code fills in on the meta device; what
a GPU does from `chips`; what is sent from `volumes`. The few constants that are not facts are in `Assumptions`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmkit.launch.chips import Chip
from llmkit.launch.volumes import (
    bubble,
    context_parallel,
    data_parallel,
    hybrid,
    pipeline_parallel,
    tensor_parallel,
)


@dataclass(frozen=True)
class Assumptions:
    """What is assumed. `passes` and `hidden` are fitted to 40 rows of one published table, those of 8 GPUs in bf16.

    The table: https://github.com/mosaicml/llm-foundry/tree/main/scripts/train/benchmarking (A100 80GB and H100).
    """

    passes: float = 22.0  # over what blocks keep: the memory traffic of everything beside products
    hidden: float = 0.1  # of the exchange of weights and gradients costs no time, where there is computation beside it
    links: float = 0.8  # of a link's rate, that collectives reach
    hop_seconds: float = 1e-5  # between machines, each of a ring
    memory: float = (
        0.9  # of a GPU's memory may be filled: the rest is for fragments, libraries and what is not foreseen
    )
    replicated: float = (
        10 / 34
    )  # of what a block keeps, that tensor parallelism does not divide (Korthikanti et al., 2022)


# Of tokens a second, over runs of others than those fitted to: torchtitan, Megatron-LM 2021, Llama 2, Llama 3.
RUNS, MEDIAN_ERROR, LARGEST_ERROR = 21, 0.09, 0.28


@dataclass(frozen=True)
class Workload:
    """A training without its machines. Bytes of the parts are those on one device; activations and FLOP of one sequence."""

    precision: str
    length: int  # tokens a sequence
    batch: int  # sequences a step, over all ranks
    longest: float  # the longest sequence, in lengths
    blocks: int
    heads: int
    key_value_heads: int
    parameters: int
    in_blocks: int  # parameters
    weights: float  # those that are computed with
    masters: float
    gradients: float
    optimizer: float
    stream: float  # activations that go from block to block
    keys_and_values: float  # of a block
    kept: float  # by a block, for its backward
    outside: float  # activations outside the blocks, logits most of all
    flops: float  # of products, forward and backward
    recomputed_flops: float  # more, with activation checkpointing
    attention_flops: (
        float  # of attention, as if nothing were masked: what is masked is not computed, but kernels are slower
    )

    @property
    def model_flops(self) -> float:
        """Of a sequence, recomputation left out, as in PaLM's MFU (Chowdhery et al., 2022, appendix B)."""
        return self.flops + self.attention_flops


@dataclass(frozen=True)
class Cluster:
    """Machines that are alike. `network_rate` is bytes a second a GPU, one direction."""

    chip: Chip
    nodes: int
    gpus: int  # a node
    network_rate: float

    @property
    def ranks(self) -> int:
        """All GPUs."""
        return self.nodes * self.gpus

    def rate(self, stride: int, size: int, assumed: Assumptions) -> float:
        """Bytes a second of collectives between `size` ranks `stride` apart; rings leave a machine by all its ports."""
        inside = max(1, min(size, self.gpus // stride))
        link = min(self.chip.link_rate, self.chip.peer_rate * max(1, inside - 1))
        return assumed.links * (link if inside >= size else min(link, inside * self.network_rate))

    def hops(self, stride: int, size: int) -> int:
        """How often a ring of such ranks goes from machine to machine."""
        machines = -(-size * stride // self.gpus)
        return machines - 1


@dataclass(frozen=True)
class Layout:
    """How a training is shared. Tensor parallel ranks are next to each other, then context, then data, then pipeline."""

    name: str
    data: int = 1
    zero: int = (
        0  # 0: all data parallel ranks hold all; 1: optimizer states are shared out; 2: gradients, too; 3: weights, too
    )
    shard: int = 0  # ranks that share them out; 0: all that there are
    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    interleave: int = 1
    considered: bool = True  # by `auto`

    @property
    def runs(self) -> bool:
        """True for what llmkit itself does today; the rest is for comparison, and for other trainers."""
        return self.name in ("one GPU", "ddp", "fsdp", "ZeRO-1", "ZeRO-2", "tensor") or self.name.endswith("x fsdp")

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.data * self.tensor * self.context * self.pipeline

    @property
    def alike(self) -> int:
        """Ranks that compute with the same weights: data parallel ones, and those that share a sequence."""
        return self.data * self.context

    @property
    def sharers(self) -> int:
        """Ranks among which optimizer states and more are shared out."""
        return (self.shard or self.alike) if self.zero else 1


@dataclass(frozen=True)
class Estimate:
    """One layout on one cluster. Memory and bytes are a rank's; `seconds` are parts of a step."""

    layout: Layout
    checkpointing: bool
    micro_batch: int  # sequences a rank computes at once
    micro_batches: int
    memory: dict[str, float]
    available: float
    sent: dict[str, float]
    seconds: dict[str, float]
    tokens_per_second: float
    mfu: float
    idle: int  # ranks that have no sequence

    @property
    def peak_memory(self) -> float:
        """All parts together."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """True when they leave a GPU's reserve free."""
        return self.peak_memory <= self.available

    @property
    def step_seconds(self) -> float:
        """All parts together."""
        return sum(self.seconds.values())


def estimate(
    work: Workload,
    cluster: Cluster,
    layout: Layout,
    *,
    micro_batch: int = 1,
    checkpointing: bool = False,
    assumed: Assumptions | None = None,
) -> Estimate:
    """What a layout takes with so many sequences at once."""
    assumed = assumed or Assumptions()
    here = -(-work.batch // layout.data)  # sequences of the busiest rank
    micro_batch = min(micro_batch, here)
    count = -(-here // micro_batch)
    seconds, sent = _compute(work, cluster, layout, micro_batch, checkpointing, assumed)
    at_once = sum(seconds.values())
    seconds = {name: count * value for name, value in seconds.items()}
    sent = {name: count * value for name, value in sent.items()}
    if layout.pipeline > 1:
        seconds["pipeline bubble"] = bubble(layout.pipeline, count, layout.interleave) * count * at_once
    sent["weights and gradients"], needed = _exchange(work, cluster, layout, count, assumed)
    beside = (count if layout.zero >= 2 else 1) * at_once * (1 if layout.zero == 3 else 2 / 3)
    seconds["exchange that is waited for"] = needed - assumed.hidden * min(needed, beside)
    states = (2 * (work.masters + work.optimizer) + work.gradients + work.weights) * _share(work, layout)
    seconds["optimizer"] = states / layout.sharers / cluster.chip.memory_rate
    step = sum(seconds.values())
    return Estimate(
        layout=layout,
        checkpointing=checkpointing,
        micro_batch=micro_batch,
        micro_batches=count,
        memory=_memory(work, layout, micro_batch, count, checkpointing, assumed),
        available=assumed.memory * cluster.chip.memory_bytes,
        sent={name: value for name, value in sent.items() if value},
        seconds={name: value for name, value in seconds.items() if value},
        tokens_per_second=work.batch * work.length / step,
        mfu=work.batch * work.model_flops / step / cluster.ranks / cluster.chip.peak[work.precision],
        idle=max(0, layout.data - work.batch) * (layout.ranks // layout.data),
    )


def _share(work: Workload, layout: Layout) -> float:
    """The part of the parameters on a rank before ZeRO; what is outside the blocks is not divided."""
    blocks = work.in_blocks / work.parameters
    return blocks / (layout.tensor * layout.pipeline) + 1 - blocks


def _memory(
    work: Workload, layout: Layout, micro_batch: int, count: int, checkpointing: bool, assumed: Assumptions
) -> dict[str, float]:
    share, sharers, zero = _share(work, layout), layout.sharers, layout.zero
    blocks = -(-work.blocks // layout.pipeline)
    in_flight = min(layout.pipeline, count)  # one forward, one backward: the first stage runs ahead of the last one
    sequences = max(micro_batch, work.longest) / layout.context
    kept = work.kept * sequences * (assumed.replicated + (1 - assumed.replicated) / layout.tensor)
    stream = work.stream * sequences
    gathered = 0.0
    if zero == 3:
        inside = work.in_blocks / work.parameters
        block, rest = work.weights * inside / work.blocks / layout.tensor, work.weights * (1 - inside)
        gathered = 3 * block + rest  # this block and the next one, and gradients before they are summed
    held = in_flight * blocks * (stream if checkpointing else kept)
    passing = max(kept, work.outside) if checkpointing else work.outside  # a block again, or the logits
    parts = {
        "weights": work.weights * share / (sharers if zero == 3 else 1),
        "masters": work.masters * share / sharers,
        "gradients": work.gradients * share / (sharers if zero >= 2 else 1),
        "optimizer": work.optimizer * share / sharers,
        "gathered": gathered,
        "activations": held + passing,
    }
    return {name: value for name, value in parts.items() if value}


def _compute(
    work: Workload, cluster: Cluster, layout: Layout, micro_batch: int, checkpointing: bool, assumed: Assumptions
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds and bytes of one micro-batch on a rank, gradients left out."""
    chip, blocks = cluster.chip, work.blocks / layout.pipeline
    each = micro_batch / (layout.tensor * layout.context * layout.pipeline)
    rate = chip.product_rate(work.precision)
    again = (4 / 3) if checkpointing else 1.0
    attention = each * work.attention_flops * again / rate
    flops = work.flops + (work.recomputed_flops if checkpointing else 0)
    traffic = assumed.passes * work.kept * micro_batch / layout.context * again
    traffic *= assumed.replicated + (1 - assumed.replicated) / layout.tensor
    stream = work.stream * micro_batch / layout.context
    seconds = {"products": each * flops / rate + attention, "memory traffic": blocks * traffic / chip.memory_rate}
    sent = {}
    if layout.tensor > 1:
        sent["tensor"] = blocks * tensor_parallel(stream, layout.tensor, recomputed=checkpointing)
        seconds["tensor exchange"] = sent["tensor"] / cluster.rate(1, layout.tensor, assumed)
    if layout.context > 1:
        held = work.keys_and_values * micro_batch / min(layout.tensor, work.key_value_heads)
        sent["context"] = blocks * context_parallel(held, layout.context, recomputed=checkpointing)
        needed = sent["context"] / cluster.rate(layout.tensor, layout.context, assumed)
        seconds["context exchange"] = needed - assumed.hidden * min(needed, attention)
    if layout.pipeline > 1:
        sent["pipeline"] = pipeline_parallel(stream / layout.tensor, layout.interleave)
        stride = layout.tensor * layout.alike
        seconds["pipeline exchange"] = sent["pipeline"] / cluster.rate(stride, 2, assumed)
    return seconds, sent


def _exchange(
    work: Workload, cluster: Cluster, layout: Layout, count: int, assumed: Assumptions
) -> tuple[float, float]:
    """Bytes and seconds a step of what ranks with the same weights exchange."""
    if layout.alike == 1:
        return 0.0, 0.0
    share, stride = _share(work, layout), layout.tensor
    weights, gradients = work.weights * share, work.gradients * share
    collectives = work.blocks / layout.pipeline * (3 * count if layout.zero == 3 else 2)
    replicas = layout.alike // layout.sharers if layout.zero else 1
    if replicas > 1:
        inside, between = hybrid(weights, gradients, layout.sharers, replicas, count)
        far = cluster.rate(stride * layout.sharers, replicas, assumed)
        waits = collectives * cluster.hops(stride * layout.sharers, replicas) / 3
        seconds = inside / cluster.rate(stride, layout.sharers, assumed) + between / far
        return inside + between, seconds + waits * assumed.hop_seconds
    sent = data_parallel(weights, gradients, layout.alike, layout.zero, count)
    waits = collectives * cluster.hops(stride, layout.alike)
    return sent, sent / cluster.rate(stride, layout.alike, assumed) + waits * assumed.hop_seconds


def days(tokens: float, tokens_per_second: float) -> float:
    """How long so many tokens take."""
    return tokens / tokens_per_second / 86400 if tokens_per_second else math.inf
