"""`llmkit plan --nodes N --gpus G --gpu NAME`: what a training takes on a cluster, by strategy, as tables or JSON."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape

from llmkit.cli.console import make_table, standard_output
from llmkit.cli.output import print_json
from llmkit.errors import LlmkitError, ResourceError, UsageError
from llmkit.launch.chips import CHIPS, Chip, find_chip

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_GIB = 2**30


@dataclass(frozen=True)
class Machines:
    """What was typed of a cluster."""

    nodes: int | None
    gpus: int | None
    gpu: str | None
    network: float | None  # Gbit/s a GPU
    tokens: str | None

    @property
    def named(self) -> bool:
        """True when the plan is for a cluster, and not for this machine."""
        return any(value is not None for value in (self.nodes, self.gpus, self.gpu, self.network, self.tokens))


def cluster_of(machines: Machines) -> Any:
    """The cluster; without --gpu it has this machine's. Raises UsageError."""
    from llmkit.launch.scale import Cluster

    chip = find_chip(machines.gpu) if machines.gpu is not None else _chip_here()
    rate = machines.network * 1e9 / 8 if machines.network is not None else chip.network_rate
    return Cluster(chip, machines.nodes or 1, machines.gpus or 1, rate)


def _chip_here() -> Chip:
    import torch

    if torch.cuda.is_available():
        return find_chip(torch.cuda.get_device_name(0), "this machine's GPU")
    raise UsageError(
        "a plan for a cluster needs the name of its GPU, and there is none here",
        expected="--gpu " + ", ".join(chip.name for chip in CHIPS),
        where="--gpu",
    )


def tokens_of(text: str | None) -> float | None:
    """`300M`, `2.5B`, `15T` or a plain number. Raises UsageError."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmbgt]?)", text.strip().lower())
    value = float(re.sub("[_,]", "", found[1])) * _UNITS[found[2]] if found else 0.0
    if not value:
        raise UsageError(
            "this is no number of tokens", got=text, expected="such as 300M, 2.5B, 15T or 1000000", where="--tokens"
        )
    return value


def readable(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def plan_on_cluster(recipe: Any, run: Any, machines: Machines, *, as_json: bool, path: Any) -> None:
    """Prints what each stage that trains takes on the cluster. Raises ResourceError when it fits in no way."""
    from llmkit.launch.choose import Options, choose, compare, nodes_that_do
    from llmkit.launch.workload import read_workload

    started = time.monotonic()
    cluster, wanted = cluster_of(machines), tokens_of(machines.tokens)
    console, told, failure = standard_output(), {}, None
    for stage in [name for name in ("pretrain", "finetune") if name in recipe.plan] or ["finetune"]:
        planned = read_workload(recipe, run, stage, cluster.ranks)
        tokens = wanted or planned.tokens
        options = Options(planned.checkpointing, planned.micro_batch)
        found = compare(planned.work, cluster, options)
        try:
            chosen, why = choose(found)
        except ResourceError as error:
            failure = _that_would_do(error, found, cluster, nodes_that_do(planned.work, cluster, options))
            chosen, why = None, ""
        told[stage] = _as_values(planned, cluster, found, chosen, why, tokens)
        if not as_json:
            _show(console, stage, told[stage], planned, found, chosen, why)
    if not as_json:
        _show_assumptions(console, cluster)
    if failure is not None:
        raise failure
    if as_json:
        print_json(
            {
                "status": "done",
                "command": "plan",
                "run_dir": str(path),
                "seconds": round(time.monotonic() - started, 2),
                "metrics": {
                    **told,
                    "assumptions": _assumptions(),
                    "accuracy": _accuracy(),
                    "gpu": _facts(cluster.chip),
                },
                "artifacts": {},
            }
        )


def _that_would_do(error: LlmkitError, found: Sequence[Any], cluster: Any, more: Any) -> ResourceError:
    """The error with the smallest that was found, and what would fit."""
    ours = [one for one in found if one.layout.considered]
    smallest = min(ours, key=lambda one: one.peak_memory)
    hints = []
    if more is not None:
        nodes, other = more
        again = " with activation checkpointing" if other.checkpointing else ""
        hints.append(f"--nodes {nodes} would do: {_split(other.layout)}{again}")
    outside = next((one for one in found if one.fits), None)
    if outside is not None:
        hints.append(f"{_split(outside.layout)} would fit here")
    hints.append("or train less: `adapter: lora`, more of `freeze`, `optimizer: adafactor`, a smaller `max_length`")
    return ResourceError(
        error.what,
        got=f"{smallest.peak_memory / _GIB:,.1f} GiB a GPU at least, with {_split(smallest.layout)}",
        expected=f"{smallest.available / _GIB:,.1f} GiB or less on {cluster.ranks} x {cluster.chip.title}",
        hint="; ".join(hints),
    )


def _split(layout: Any) -> str:
    """`tensor x fsdp` with its sizes."""
    sizes = {"data": layout.data, "tensor": layout.tensor, "context": layout.context, "pipeline": layout.pipeline}
    shown = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return f"{layout.name} ({shown})" if shown else str(layout.name)


def _as_values(planned: Any, cluster: Any, found: Sequence[Any], chosen: Any, why: str, tokens: float | None) -> Any:
    from llmkit.launch.scale import days

    work = planned.work
    return {
        "nodes": cluster.nodes,
        "gpus_a_node": cluster.gpus,
        "gpu": cluster.chip.name,
        "network_bytes_per_second": cluster.network_rate,
        "sequence_tokens": work.length,
        "batch_sequences": work.batch,
        "batch_from": planned.batch_from,
        "batch_tokens": work.batch * work.length,
        "tokens": tokens,
        "parameters": work.parameters,
        "precision": work.precision,
        "auto": None if chosen is None else {"strategy": chosen.layout.name, "why": why},
        "strategies": [
            {
                "strategy": one.layout.name,
                **{
                    key: value for key, value in asdict(one.layout).items() if key not in ("name", "interleave", "runs")
                },
                "run_by_llmkit": one.layout.runs,
                "fits": one.fits,
                "activation_checkpointing": one.checkpointing,
                "micro_batch_sequences": one.micro_batch,
                "micro_batches": one.micro_batches,
                "idle_gpus": one.idle,
                "memory_bytes": {name: int(value) for name, value in one.memory.items()},
                "peak_memory_bytes": int(one.peak_memory),
                "available_bytes": int(one.available),
                "sent_bytes": {name: int(value) for name, value in one.sent.items()},
                "seconds": {name: float(value) for name, value in one.seconds.items()},
                "step_seconds": float(one.step_seconds),
                "tokens_per_second": float(one.tokens_per_second),
                "mfu": float(one.mfu),
                "days": None if tokens is None else float(days(tokens, one.tokens_per_second)),
            }
            for one in found
        ],
    }


def _show(console: Console, stage: str, told: Any, planned: Any, found: Sequence[Any], chosen: Any, why: str) -> None:
    facts = [
        (
            "GPUs",
            f"{told['nodes']:,} {'node' if told['nodes'] == 1 else 'nodes'} x {told['gpus_a_node']} {told['gpu']}",
        ),
        ("parameters", f"{told['parameters']:,}, {told['precision']}"),
        (
            "batch",
            f"{told['batch_sequences']:,} sequences of {told['sequence_tokens']:,} tokens ({planned.batch_from})",
        ),
    ]
    if told["tokens"] is not None:
        facts.append(("tokens", f"{told['tokens']:,.0f}"))
    console.print(make_table(f"\n{stage}", ("", ""), facts))
    columns = ["strategy", "at once", "GiB a GPU", "", "GiB sent", "s a step", "tokens/s", "MFU"]
    rows = []
    for one, value in zip(found, told["strategies"], strict=True):
        again = ", again" if one.checkpointing else ""
        idle = f", {one.idle} idle" if one.idle else ""
        cells: list[Any] = [
            ("" if one.layout.runs else "* ") + _split(one.layout),
            f"{one.micro_batch} x {one.micro_batches}{again}{idle}",
            f"{one.peak_memory / _GIB:,.1f}",
            "fits" if one.fits else "no",
            f"{sum(one.sent.values()) / _GIB:,.1f}",
            f"{one.step_seconds:,.3g}",
            f"{one.tokens_per_second:,.0f}",
            f"{one.mfu:.0%}",
        ]
        rows.append([*cells, readable(86400 * value["days"])] if value["days"] is not None else cells)
    if told["tokens"] is not None:
        columns.append("in all")
    console.print(make_table("", columns, rows))
    console.print(
        "[dim]at once: sequences a GPU, times micro-batches a step; again: with activation checkpointing; "
        "GiB sent: a GPU a step; *: llmkit itself does not run it yet[/]",
        soft_wrap=True,
    )
    if chosen is None:
        return
    console.print(f"[bold]best[/] on paper: {escape(_split(chosen.layout))}: {escape(why)}", soft_wrap=True)
    for name, parts, total, unit in (
        ("memory", chosen.memory, _GIB, "GiB"),
        ("sent", chosen.sent, _GIB, "GiB"),
        ("time", chosen.seconds, chosen.step_seconds / 100, "%"),
    ):
        if parts:
            listed = ", ".join(f"{part} {value / total:,.1f} {unit}" for part, value in parts.items())
            console.print(f"  [dim]{name:<7}[/]{escape(listed)}", soft_wrap=True)


def _show_assumptions(console: Console, cluster: Any) -> None:
    chip = cluster.chip
    fp8 = f" ({chip.peak['fp8'] / 1e12:,.0f} in fp8)" if "fp8" in chip.peak else ""
    rows = [
        (
            "GPU",
            f"{chip.title}: {chip.peak['bf16'] / 1e12:,.0f} TFLOP/s in bf16{fp8}, {chip.memory_bytes / _GIB:,.0f} GiB",
        ),
        ("products", f"{chip.product_rate('bf16') / 1e12:,.0f} TFLOP/s, the best that was measured of bf16"),
        ("memory", f"{chip.memory_rate / 1e9:,.0f} GB/s"),
        ("in a node", f"{chip.link_rate / 1e9:,.0f} GB/s from GPU to GPU, one direction"),
        ("network", f"{cluster.network_rate / 1e9:,.3g} GB/s a GPU ({_network_from(cluster)})"),
        *[("", text) for _, text in _assumptions().values()],
        ("accuracy", _accuracy()["text"]),
        ("from", "\n".join(chip.sources)),
    ]
    console.print(make_table("\nassumed", ("", ""), [(name, escape(text)) for name, text in rows]))


def _network_from(cluster: Any) -> str:
    given = cluster.network_rate != cluster.chip.network_rate
    return "--network" if given else cluster.chip.network_from + "; --network says otherwise"


def _assumptions() -> dict[str, tuple[float, str]]:
    """Each by name, with its value and what it means."""
    from llmkit.launch.scale import Assumptions

    assumed = Assumptions()
    said = {
        "passes": f"all beside products passes {assumed.passes:g} times over what blocks keep for the backward (fitted)",
        "hidden": f"{assumed.hidden:.0%} of the exchange of weights and gradients costs no time (fitted)",
        "links": f"collectives reach {assumed.links:.0%} of a link's rate",
        "hop_seconds": f"{assumed.hop_seconds * 1e6:.0f} us from node to node, each of a ring",
        "memory": f"{assumed.memory:.0%} of a GPU's memory may be filled",
        "replicated": f"{assumed.replicated:.0%} of what a block keeps is not divided by tensor parallelism",
    }
    return {name: (getattr(assumed, name), text) for name, text in said.items()}


def _accuracy() -> dict[str, Any]:
    from llmkit.launch.scale import LARGEST_ERROR, MEDIAN_ERROR, RUNS

    text = (
        f"tokens a second of {RUNS} published runs on A100 and H100, to which nothing was fitted, are foretold with a "
        f"median error of {MEDIAN_ERROR:.0%} and {LARGEST_ERROR:.0%} at most; on other GPUs nobody checked"
    )
    return {"published_runs": RUNS, "median_error": MEDIAN_ERROR, "largest_error": LARGEST_ERROR, "text": text}


def _facts(chip: Chip) -> dict[str, Any]:
    return {key: value for key, value in asdict(chip).items() if key not in ("others", "mesh")}
