"""How results look in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks.results import FORMULA, disturbances

_GB = 1e9


def show_machine(console: Console, facts: dict[str, Any]) -> None:
    """The machine and its peaks."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    console.print(f"{facts['gpu'] or facts['cpu']}, {facts['cores']} cores; {versions}", highlight=False)
    bf16, fp32 = (facts[f"{name}_peak_flops"] / 1e12 for name in ("bf16", "fp32"))
    console.print(f"matrix product: bf16 {bf16:.2f} TFLOP/s, fp32 {fp32:.2f}", highlight=False)


def show_workload(console: Console, name: str, result: dict[str, Any]) -> None:
    """Medians, and ratios to each peer."""
    rows, before = result["rows"], result["before"]
    rounds = max((each["rounds"] for each in result["medians"].values()), default=0)
    title = f"{name}: {rows['tokens']:,} tokens of {rows['examples']} rows an epoch; median of {rounds}"
    columns = ("", "", "tokens/s", "later", "of peak", "wall s", "peak GB", "loss", "accuracy")
    table = _table(title, columns)
    table.add_row("before training", "", "", "", "", "", "", *_scores(before))
    for contestant, found in result["medians"].items():
        memory = found.get("peak_cuda_bytes", found["peak_memory_bytes"]) / _GB
        table.add_row(
            contestant,
            found["precision"],
            f"{found['tokens_per_second']:.1f}",
            f"{found['later_tokens_per_second']:.1f}" if "later_tokens_per_second" in found else "",
            f"{found['share_of_peak']:.1%}",
            f"{found['wall_seconds']:.1f}",
            f"{memory:.2f}",
            *_scores(found),
        )
    console.print(table)
    _show_ratios(console, result["ratios"])
    for line in disturbances(result["runs"]):
        console.print(f"disturbed: {line}", style="yellow", highlight=False)


def show_legend(console: Console) -> None:
    """What the columns mean."""
    console.print("loss and accuracy: on held-out rows, scored by one judge for all", highlight=False)
    console.print("later: tokens a second from the second epoch on", highlight=False)
    console.print("memory: the largest resident size of the process, or of the GPU where there is one", highlight=False)
    console.print(f"of peak: {FORMULA}", highlight=False)


def show_mistakes(console: Console, title: str, lines: list[str]) -> None:
    """What makes a comparison void."""
    console.rule(f"[bold red]{title}")
    for line in lines:
        console.print(line, style="red", highlight=False, markup=False)


def _show_ratios(console: Console, ratios: dict[str, Any]) -> None:
    if not ratios:
        return
    columns = ("peer", "tokens/s", "later", "wall s", "memory", "loss, median")
    table = _table("llmkit / peer, round by round: min, median, max (loss: llmkit - peer)", columns)
    for peer, found in ratios.items():
        keys = ("tokens_per_second", "later_tokens_per_second", "wall_seconds", "peak_memory_bytes")
        shares = [_range(found[key]) if key in found else "" for key in keys]
        table.add_row(peer, *shares, f"{found['loss_difference']['median']:+.4f}")
    console.print(table)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _scores(found: dict[str, Any]) -> tuple[str, str]:
    accuracy = found.get("accuracy")
    return f"{found['loss']:.4f}", "" if accuracy is None else f"{accuracy:.1%}"


def _range(spread: dict[str, float]) -> str:
    return " ".join(f"{spread[key]:.2f}" for key in ("min", "median", "max"))
