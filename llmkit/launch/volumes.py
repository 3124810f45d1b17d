"""How many bytes each way of sharing a training sends, a rank; closed formulas, as in the papers.

Collectives are rings: each rank sends (n - 1) / n of the data in an all-gather or a reduce-scatter, and twice that in an
all-reduce (Patarasuk and Yuan, 2009: https://doi.org/10.1016/j.jpdc.2008.09.002). In numbers a parameter that is 2 for
data parallelism and ZeRO-1 and -2, and 3 for ZeRO-3 (Rajbhandari et al., 2020: https://arxiv.org/abs/1910.02054).
"""

from __future__ import annotations


def all_gather(size: float, ranks: int) -> float:
    """Bytes that a rank sends until all have `size` bytes; a reduce-scatter sends as many."""
    return size * (ranks - 1) / ranks


def all_reduce(size: float, ranks: int) -> float:
    """Bytes that a rank sends until all have the sum."""
    return 2 * all_gather(size, ranks)


def data_parallel(weights: float, gradients: float, ranks: int, stage: int, micro_batches: int = 1) -> float:
    """Bytes a rank a step at a ZeRO stage: 0 is plain data parallelism, 3 is fully sharded.

    Stages 0 and 1 wait for the last micro-batch; 2 and 3 sum gradients after each; 3 gathers weights twice in each.
    """
    if stage == 0:
        return all_reduce(gradients, ranks)
    sums, gathers = {1: (1, 1), 2: (micro_batches, 1), 3: (micro_batches, 2 * micro_batches)}[stage]
    return sums * all_gather(gradients, ranks) + gathers * all_gather(weights, ranks)


def hybrid(weights: float, gradients: float, shard: int, replicas: int, micro_batches: int = 1) -> tuple[float, float]:
    """Bytes a rank a step within its group of fully sharded weights, and between groups, which hold the same.

    Zhao et al., 2023 (https://arxiv.org/abs/2304.11277), section 3.2.2.
    """
    inside = data_parallel(weights, gradients, shard, 3, micro_batches)
    return inside, micro_batches * all_reduce(gradients / shard, replicas)


def tensor_parallel(stream: float, ranks: int, *, recomputed: bool = False) -> float:
    """Bytes a rank a block: two all-reduces of the residual stream forward, two backward, two more when recomputed.

    With b s h numbers in the stream that is 8 b s h (t - 1) / t (Narayanan et al., 2021, section 3.2:
    https://arxiv.org/abs/2104.04473; Shoeybi et al., 2019, figure 4: https://arxiv.org/abs/1909.08053).
    """
    return (6 if recomputed else 4) * all_reduce(stream, ranks)


def context_parallel(keys_and_values: float, ranks: int, *, recomputed: bool = False) -> float:
    """Bytes a rank a block for `keys_and_values` of a whole sequence: once round forward, and twice backward.

    Each rank passes on what it holds, 1 / c of the sequence, to all others (ring attention, Liu et al., 2023:
    https://arxiv.org/abs/2310.01889); backward their gradients go along.
    """
    return (4 if recomputed else 3) * all_gather(keys_and_values, ranks)


def pipeline_parallel(stream: float, interleave: int = 1) -> float:
    """Bytes a rank a micro-batch: the stream goes on, its gradient comes back, once for each part of a stage."""
    return 2 * stream * interleave


def bubble(stages: int, micro_batches: int, interleave: int = 1) -> float:
    """The time in which a pipeline's stages wait, as a share of the time that they compute (Narayanan et al., 2021)."""
    return (stages - 1) / (micro_batches * interleave)
