"""Which ways of sharing a training there are on a cluster, and which one to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmkit.errors import ResourceError
from llmkit.launch.scale import Cluster, Estimate, Layout, Workload, estimate

SIMPLER = 0.05  # a simpler way is taken when the fastest one gains less
_MOST_NODES = 2**14


@dataclass(frozen=True)
class Options:
    """What the recipe settles: activation checkpointing and sequences at once; both are free where it does not."""

    checkpointing: bool = False
    micro_batch: int | None = None


def layouts(work: Workload, cluster: Cluster) -> Iterator[Layout]:
    """All that a cluster allows, simple ones first; what llmkit does not run itself comes last."""
    ranks, gpus = cluster.ranks, cluster.gpus
    yield Layout("ddp" if ranks > 1 else "one GPU", data=ranks)
    if ranks == 1:
        return
    yield Layout("fsdp", data=ranks, zero=3)
    if cluster.nodes > 1 and gpus > 1:
        yield Layout("fsdp in each node", data=ranks, zero=3, shard=gpus)
    yield Layout("ZeRO-1", data=ranks, zero=1)
    yield Layout("ZeRO-2", data=ranks, zero=2)
    for parts in _powers(ranks, lambda n: work.length % (2 * n) == 0):
        yield Layout("context x fsdp", data=ranks // parts, zero=3, context=parts)
    for tensor in _powers(gpus, lambda n: work.key_value_heads % n == 0):
        rest = ranks // tensor
        if rest == 1:
            yield Layout("tensor", tensor=tensor)
            continue
        yield Layout("tensor x ddp", data=rest, tensor=tensor)
        yield Layout("tensor x fsdp", data=rest, zero=3, tensor=tensor)
        for parts in _powers(rest, lambda n: work.length % (2 * n) == 0):
            yield Layout("tensor x context x fsdp", data=rest // parts, zero=3, tensor=tensor, context=parts)
    for stages in _powers(ranks, lambda n: n <= work.blocks):
        for tensor in (1, *_powers(gpus, lambda n: work.key_value_heads % n == 0)):
            if ranks % (stages * tensor) == 0:
                name = "tensor x pipeline x ZeRO-1" if tensor > 1 else "pipeline x ZeRO-1"
                data = ranks // stages // tensor
                yield Layout(name, data=data, zero=1, tensor=tensor, pipeline=stages, considered=False)


def _powers(limit: int, allowed: Callable[[int], bool]) -> list[int]:
    """2, 4, 8, ... that divide `limit`."""
    return [2**n for n in range(1, limit.bit_length()) if limit % 2**n == 0 and allowed(2**n)]


def best_of(work: Workload, cluster: Cluster, layout: Layout, options: Options) -> Estimate:
    """A layout with the fastest micro-batch that fits, with or without activation checkpointing; else the smallest."""
    here = -(-work.batch // layout.data)
    sizes = [min(options.micro_batch, here)] if options.micro_batch else sorted({here, *_up_to(here)})
    fitting, smallest = [], None
    for checkpointing in (True,) if options.checkpointing else (False, True):
        for size in sizes:
            found = estimate(work, cluster, layout, micro_batch=size, checkpointing=checkpointing)
            if found.fits:
                fitting.append(found)
            if smallest is None or found.peak_memory < smallest.peak_memory:
                smallest = found
    assert smallest is not None
    return min(fitting, key=lambda found: found.step_seconds, default=smallest)


def _up_to(limit: int) -> list[int]:
    return [2**n for n in range(limit.bit_length())]


def compare(work: Workload, cluster: Cluster, options: Options) -> list[Estimate]:
    """The best of each way, by name, in the order of `layouts`."""
    found: dict[str, Estimate] = {}
    for layout in layouts(work, cluster):
        new = best_of(work, cluster, layout, options)
        old = found.get(layout.name)
        if old is None or _rank(new) < _rank(old):
            found[layout.name] = new
    return list(found.values())


def _rank(found: Estimate) -> tuple[bool, float]:
    """What fits comes first, then what is fast, or small where nothing fits."""
    return (not found.fits, found.step_seconds if found.fits else found.peak_memory)


def choose(found: Sequence[Estimate]) -> tuple[Estimate, str]:
    """The one that `auto` takes, and why: the fastest that fits, but for pipelines, or a simpler one about as fast.

    Raises ResourceError when none fits.
    """
    fitting = [one for one in found if one.fits and one.layout.considered]
    if not fitting:
        raise ResourceError("the model fits with no strategy")
    fastest = min(fitting, key=lambda one: one.step_seconds)
    chosen = next(one for one in fitting if one.step_seconds <= (1 + SIMPLER) * fastest.step_seconds)
    if len(fitting) == 1:
        return chosen, "it is the only one that fits"
    others = len(fitting)
    if chosen is fastest:
        return chosen, f"it is the fastest of {others} that fit"
    slower = chosen.step_seconds / fastest.step_seconds - 1
    return chosen, f"it is the simplest of {others} that fit, and {fastest.layout.name} is only {slower:.1%} faster"


def nodes_that_do(work: Workload, cluster: Cluster, options: Options) -> tuple[int, Estimate] | None:
    """The smallest number of nodes, doubled from here on, with which something fits but pipelines; None for none."""
    nodes = cluster.nodes * 2
    while nodes <= _MOST_NODES:
        larger = replace(cluster, nodes=nodes)
        grown = replace(work, batch=max(work.batch, larger.ranks))
        fitting = [one for one in compare(grown, larger, options) if one.fits and one.layout.considered]
        if fitting:
            return nodes, min(fitting, key=lambda one: one.step_seconds)
        nodes *= 2
    return None
