"""Published runs, and the sizes of their models, for tests of what is foretold.

Facts of: llm-foundry (https://github.com/mosaicml/llm-foundry/tree/main/scripts/train/benchmarking), torchtitan
(https://github.com/pytorch/torchtitan: docs/performance.md of 2024, and benchmarks/), Megatron-LM (Narayanan et al., 2021,
table 1: https://arxiv.org/abs/2104.04473), Llama 2 (Touvron et al., 2023, table 2: https://arxiv.org/abs/2307.09288),
Llama 3 (Grattafiori et al., 2024, table 4: https://arxiv.org/abs/2407.21783).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmkit.launch.chips import find_chip
from llmkit.launch.scale import Assumptions, Cluster, Estimate, Layout, Workload, estimate


def transformer(
    blocks: int,
    hidden: int,
    heads: int,
    length: int,
    batch: int,
    *,
    vocabulary: int = 50368,
    feed_forward: int = 0,
    gated: bool = False,
    key_value_heads: int = 0,
    gradient_bytes: int = 4,
    precision: str = "bf16",
) -> Workload:
    """A decoder by its sizes: FLOP as in PaLM's appendix B, activations as in Korthikanti et al., 2022, table 2."""
    key_value_heads = key_value_heads or heads
    feed_forward = feed_forward or 4 * hidden
    narrow = key_value_heads / heads
    block = hidden**2 * (2 + 2 * narrow) + (3 if gated else 2) * hidden * feed_forward
    head = vocabulary * hidden
    parameters = blocks * block + (2 * head if gated else head)
    numbers = length * hidden
    mlp = (4 if gated else 2) * 2 * feed_forward / hidden  # before and after each activation function
    return Workload(
        precision=precision,
        length=length,
        batch=batch,
        longest=1.0,
        blocks=blocks,
        heads=heads,
        key_value_heads=key_value_heads,
        parameters=int(parameters),
        in_blocks=int(blocks * block),
        weights=2 * parameters,
        masters=4 * parameters,
        gradients=gradient_bytes * parameters,
        optimizer=8 * parameters,
        stream=2 * numbers,
        keys_and_values=2 * 2 * numbers * narrow,
        kept=numbers * (2 + 2 + 2 + 2 + 4 * narrow + 2 + mlp + 4),
        outside=8 * length * vocabulary,
        flops=6 * (blocks * block + head) * length,
        recomputed_flops=2 * blocks * block * length,
        attention_flops=12 * blocks * hidden * length**2,
    )


def mpt(size: str, length: int, batch: int) -> Workload:
    sizes = {
        "125m": (12, 768, 12), "350m": (24, 1024, 16), "760m": (24, 1536, 12), "1b": (24, 2048, 16), "3b": (32, 2560, 20),
        "7b": (32, 4096, 32), "13b": (40, 5120, 40), "30b": (48, 7168, 56), "70b": (80, 8192, 64),
    }  # fmt: skip
    return transformer(*sizes[size], length, batch)


def llama(size: str, length: int, batch: int) -> Workload:
    """Llama 2 (with a 2), 3 and 3.1."""
    blocks, hidden, heads, feed_forward, narrow, vocabulary = {
        "2-7b": (32, 4096, 32, 11008, 32, 32000),
        "2-13b": (40, 5120, 40, 13824, 40, 32000),
        "2-70b": (80, 8192, 64, 28672, 8, 32000),
        "8b": (32, 4096, 32, 14336, 8, 128256),
        "70b": (80, 8192, 64, 28672, 8, 128256),
        "405b": (126, 16384, 128, 53248, 8, 128256),
    }[size]
    return transformer(
        blocks, hidden, heads, length, batch,
        feed_forward=feed_forward, key_value_heads=narrow, vocabulary=vocabulary, gated=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One published figure: tokens a second a GPU."""

    source: str
    work: Workload
    chip: str
    gpus: int
    layout: Layout
    micro_batch: int
    checkpointing: bool
    tokens_per_second: float
    memory_rate: float = 0.0  # bytes a second, where it is not the chip's

    def foretold(self, assumed: Assumptions | None = None) -> Estimate:
        chip = find_chip(self.chip)
        chip = replace(chip, memory_rate=self.memory_rate or chip.memory_rate)
        cluster = Cluster(chip, max(1, self.gpus // 8), min(8, self.gpus), chip.network_rate)
        return estimate(
            self.work,
            cluster,
            self.layout,
            micro_batch=self.micro_batch,
            checkpointing=self.checkpointing,
            assumed=assumed,
        )

    def error(self, assumed: Assumptions | None = None) -> float:
        """What is foretold, relative to what was published, less one."""
        return self.foretold(assumed).tokens_per_second / self.gpus / self.tokens_per_second - 1


def fsdp(ranks: int) -> Layout:
    return Layout("fsdp", data=ranks, zero=3)


def _foundry() -> list[Run]:
    """Model, length, GPUs, chip, micro-batch, sequences a step, activation checkpointing, tokens a second a GPU."""
    rows = [
        ("30b", 8192, 8, "a100", 1, 168, True, 574), ("30b", 4096, 8, "a100", 1, 168, True, 814),
        ("30b", 2048, 8, "a100", 3, 504, True, 916), ("30b", 1024, 8, "a100", 6, 1008, True, 946),
        ("13b", 16384, 8, "a100", 3, 72, True, 1431), ("13b", 8192, 8, "a100", 5, 120, True, 1795),
        ("13b", 4096, 8, "a100", 10, 240, True, 2060), ("13b", 2048, 8, "a100", 2, 48, False, 2262),
        ("7b", 8192, 8, "a100", 8, 128, True, 3206), ("7b", 4096, 8, "a100", 16, 256, True, 3684),
        ("7b", 2048, 8, "a100", 6, 96, False, 4641), ("3b", 8192, 8, "a100", 3, 144, False, 7695),
        ("3b", 4096, 8, "a100", 5, 240, False, 9457), ("3b", 2048, 8, "a100", 10, 160, False, 10811),
        ("1b", 8192, 8, "a100", 3, 96, False, 13814), ("1b", 4096, 8, "a100", 7, 224, False, 17807),
        ("1b", 2048, 8, "a100", 14, 448, False, 20513), ("760m", 4096, 8, "a100", 12, 192, False, 27351),
        ("760m", 2048, 8, "a100", 24, 384, False, 32434), ("350m", 2048, 8, "a100", 32, 512, False, 58782),
        ("125m", 2048, 8, "a100", 32, 512, False, 141737),
        ("30b", 8192, 8, "h100", 1, 168, True, 1384), ("30b", 4096, 8, "h100", 1, 168, True, 1802),
        ("30b", 2048, 8, "h100", 3, 504, True, 2002), ("30b", 1024, 8, "h100", 6, 1008, True, 2084),
        ("13b", 16384, 8, "h100", 3, 72, True, 2985), ("13b", 4096, 8, "h100", 10, 240, True, 4717),
        ("13b", 2048, 8, "h100", 2, 16, False, 4792), ("13b", 1024, 8, "h100", 40, 960, True, 5502),
        ("7b", 8192, 8, "h100", 8, 128, True, 6935), ("7b", 4096, 8, "h100", 16, 256, True, 8611),
        ("7b", 2048, 8, "h100", 6, 48, False, 10643), ("7b", 1024, 8, "h100", 64, 1024, True, 10203),
        ("3b", 8192, 8, "h100", 3, 144, False, 16578), ("3b", 4096, 8, "h100", 5, 240, False, 20964),
        ("1b", 8192, 8, "h100", 3, 96, False, 29157), ("1b", 4096, 8, "h100", 7, 224, False, 38535),
        ("1b", 2048, 8, "h100", 14, 112, False, 45455), ("760m", 4096, 8, "h100", 12, 192, False, 55459),
        ("760m", 2048, 8, "h100", 24, 384, False, 63147),
    ]  # fmt: skip
    return [
        Run("llm-foundry", mpt(size, length, batch), chip, gpus, fsdp(gpus), micro, again, speed)
        for size, length, gpus, chip, micro, batch, again, speed in rows
    ]


def _foundry_nodes() -> list[Run]:
    """The same on more than one machine: 1600 Gbit/s a node of A100, and no word about that of H100."""
    rows = [
        ("70b", 2048, 64, "a100", 8, 2048, True, 410), ("70b", 2048, 32, "a100", 2, 1024, True, 373),
        ("70b", 2048, 64, "h100", 8, 2048, True, 1039), ("70b", 2048, 32, "h100", 2, 1024, True, 882),
        ("30b", 2048, 32, "h100", 14, 1344, True, 2308), ("30b", 2048, 16, "h100", 10, 480, True, 2263),
        ("13b", 2048, 64, "h100", 2, 128, False, 4800), ("13b", 2048, 16, "h100", 2, 32, False, 4767),
        ("3b", 2048, 64, "h100", 6, 1152, False, 22525), ("3b", 2048, 16, "h100", 10, 480, False, 24142),
        ("1b", 2048, 64, "h100", 20, 1280, False, 44402), ("760m", 2048, 32, "h100", 24, 768, False, 67971),
        ("70b", 2048, 128, "a100-40gb", 4, 512, True, 376), ("30b", 2048, 128, "a100-40gb", 6, 768, True, 865),
        ("13b", 2048, 64, "a100-40gb", 16, 1024, True, 1976), ("7b", 2048, 128, "a100-40gb", 18, 2304, True, 3623),
        ("3b", 2048, 128, "a100-40gb", 6, 768, False, 9538),
    ]  # fmt: skip
    return [
        Run("llm-foundry, several nodes", mpt(size, length, batch), chip, gpus, fsdp(gpus), micro, again, speed)
        for size, length, gpus, chip, micro, batch, again, speed in rows
    ]


def _torchtitan() -> list[Run]:
    """Selective recomputation counts as none; the 70B runs recompute everything. Their H100 had HBM2e of 2.4 TB/s."""
    return [
        Run("torchtitan", llama("8b", 8192, 64), "a100", 64, fsdp(64), 1, False, 2904),
        Run("torchtitan", llama("70b", 8192, 64), "a100", 64, fsdp(64), 1, True, 331),
        Run("torchtitan", llama("2-13b", 4096, 128), "a100", 64, fsdp(64), 2, False, 2162),
        Run("torchtitan", llama("2-70b", 4096, 128), "a100", 64, fsdp(64), 2, True, 353),
        Run("torchtitan", llama("8b", 8192, 16), "h100", 8, fsdp(8), 2, False, 6667, 2.4e12),
        Run("torchtitan", llama("8b", 8192, 256), "h100", 128, fsdp(128), 2, False, 6514, 2.4e12),
    ]


def _megatron() -> list[Run]:
    """Blocks, hidden, heads, tensor, pipeline, GPUs, sequences a step, TFLOP/s a GPU with recomputation (equation 3)."""
    rows = [
        (24, 2304, 24, 1, 1, 32, 512, 137), (30, 3072, 32, 2, 1, 64, 512, 138), (36, 4096, 32, 4, 1, 128, 512, 142),
        (40, 6144, 48, 8, 1, 256, 1024, 135), (48, 8192, 64, 8, 2, 512, 1536, 138), (60, 10240, 80, 8, 4, 1024, 1792, 140),
        (80, 12288, 96, 8, 8, 1536, 2304, 148), (96, 16384, 128, 8, 16, 1920, 2160, 155),
        (105, 20480, 128, 8, 35, 2520, 2520, 163), (128, 25600, 160, 8, 64, 3072, 3072, 163),
    ]  # fmt: skip
    runs = []
    for blocks, hidden, heads, tensor, pipeline, gpus, batch, tera in rows:
        work = transformer(blocks, hidden, heads, 2048, batch, vocabulary=51200)
        counted = 96 * blocks * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * blocks * hidden))  # FLOP a token
        data = gpus // tensor // pipeline
        layout = Layout("megatron", data=data, tensor=tensor, pipeline=pipeline)
        runs.append(Run("Megatron-LM 2021", work, "a100", gpus, layout, 1, True, tera * 1e12 / counted))
    return runs


def _llama_3() -> list[Run]:
    """405B at 8,192 tokens, 16M a step, TFLOP/s a GPU. 126 blocks on 16 stages: one a part, first and last with one less."""
    rows = [(8192, 64, 430), (16384, 128, 400)]
    runs = []
    for gpus, data, tera in rows:
        work = llama("405b", 8192, 2048)
        layout = Layout("llama 3", data=data, zero=1, tensor=8, pipeline=16, interleave=8)
        speed = tera * 1e12 / (work.model_flops / work.length)
        runs.append(Run("Llama 3 405B", work, "h100", gpus, layout, 1, False, speed))
    return runs


def _llama_2() -> list[Run]:
    """GPU hours of 2T tokens, 4M a step; the report gives neither GPUs nor layout: taken as 256 to 2,048, fully sharded."""
    rows = [("2-7b", 256, 184_320, False, 1), ("2-13b", 512, 368_640, False, 1), ("2-70b", 2048, 1_720_320, True, 1)]
    return [
        Run("Llama 2, GPU hours", llama(size, 4096, 1024 if gpus < 2048 else 2048), "a100", gpus, fsdp(gpus), micro, again,
            2e12 / hours / 3600)
        for size, gpus, hours, again, micro in rows
    ]  # fmt: skip


FITTED = _foundry()
SAME_TABLE = _foundry_nodes()
OTHERS = [*_torchtitan(), *_megatron(), *_llama_3(), *_llama_2()]
