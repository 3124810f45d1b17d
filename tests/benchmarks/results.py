"""From single runs to the figures that are compared: medians over rounds, and ratios pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from tests.benchmarks.workloads import LLMKIT

Record = dict[str, Any]

FORMULA = (
    "FLOP = 6 x parameters in the blocks x tokens + 6 x parameters of the output layer x supervised tokens (or texts); "
    "attention scores, embeddings and padding are left out; over seconds in the training loop and the bf16 matrix peak"
)
RATIOS = ("tokens_per_second", "wall_seconds", "peak_memory_bytes", "later_tokens_per_second")
_DISTURBED = 0.05  # other programs' share of the processor time, from which on a run is named
_MEDIANS = (*RATIOS, "train_seconds", "share_of_peak", "loss", "accuracy", "peak_cuda_bytes")


def add_rates(run: Record, rows: Record, epochs: int, before: Record, peak_flops: float) -> None:
    """Adds tokens a second and the share of the machine's peak; the tokens are the same for everybody."""
    tokens, supervised = rows["tokens"] * epochs, rows["supervised"] * epochs
    flops = 6 * (before["block_parameters"] * tokens + before["output_parameters"] * supervised)
    if epochs > 1:  # when what can be kept is kept, and all kernels are there
        run["later_tokens_per_second"] = rows["tokens"] * (epochs - 1) / run["later_seconds"]
    run["tokens_per_second"] = tokens / run["train_seconds"]
    run["share_of_peak"] = flops / run["train_seconds"] / peak_flops


def mismatches(runs: Sequence[Record], rows: Record, epochs: int, batch_size: int) -> list[str]:
    """Where a contestant did not learn from what all were given: then nothing else may be compared."""
    steps = epochs * -(-rows["examples"] // batch_size)
    expected = {"tokens": rows["tokens"] * epochs, "supervised": rows["supervised"] * epochs, "steps": steps}
    return [
        f"{run['contestant']}, round {run['round']}: {run[key]} {key}, not {wanted}"
        for run in runs
        for key, wanted in expected.items()
        if run[key] != wanted
    ]


def disturbances(runs: Sequence[Record]) -> list[str]:
    """Runs during which other programs took much of the processor: their times say little."""
    return [
        f"{run['contestant']}, round {run['round']}: other programs used {run['other_cpu_seconds']:.0f} s of processor "
        f"time beside its {run['cpu_seconds']:.0f} s"
        for run in runs
        if run["other_cpu_seconds"] is not None and run["other_cpu_seconds"] > _DISTURBED * run["cpu_seconds"]
    ]


def medians(runs: Sequence[Record]) -> dict[str, Record]:
    """Contestant -> the median over its rounds of everything that was measured."""
    found: dict[str, Record] = {}
    for name in dict.fromkeys(run["contestant"] for run in runs):
        own = [run for run in runs if run["contestant"] == name]
        values = {key: [run[key] for run in own if run.get(key) is not None] for key in _MEDIANS}
        found[name] = {key: median(each) for key, each in values.items() if each}
        found[name] |= {"rounds": len(own), "precision": own[0]["precision"]}
    return found


def ratios(runs: Sequence[Record]) -> dict[str, Record]:
    """Peer -> llmkit's figure divided by the peer's in the same round: min, median and max over the rounds.

    `loss_difference` is llmkit's held-out loss less the peer's.
    """
    by_round = {(run["contestant"], run["round"]): run for run in runs}
    found: dict[str, Record] = {}
    for peer in dict.fromkeys(run["contestant"] for run in runs if run["contestant"] != LLMKIT):
        rounds = sorted(number for name, number in by_round if name == peer and (LLMKIT, number) in by_round)
        pairs = [(by_round[LLMKIT, number], by_round[peer, number]) for number in rounds]
        if pairs:
            shared = [key for key in RATIOS if all(key in run for pair in pairs for run in pair)]
            found[peer] = {key: _spread([ours[key] / theirs[key] for ours, theirs in pairs]) for key in shared}
            found[peer]["loss_difference"] = _spread([ours["loss"] - theirs["loss"] for ours, theirs in pairs])
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}
