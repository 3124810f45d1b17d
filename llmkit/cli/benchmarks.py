"""How scores on public benchmarks look on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from llmkit.cli.console import make_table


def show_benchmarks(console: Console, results: dict[str, Any]) -> None:
    """Each metric of each benchmark with its standard error, a column for each model; nothing where there are none."""
    found: dict[str, dict[str, dict[str, float]]] = results.get("benchmarks", {})
    if not found:
        return
    names = [*(name for name in found if name != "model"), "model"]
    rows = []
    for task, metrics in found["model"].items():
        for metric in metrics:
            if metric != "examples" and "_stderr" not in metric:
                rows.append([task, metric, *(_with_error(found[name][task], metric) for name in names)])
    console.print()
    console.print(make_table("benchmarks, by lm-eval", ("", "", *names), rows))


def _with_error(metrics: dict[str, float], metric: str) -> str:
    """`0.2500 ± 0.0903`; the filter of lm-eval stands behind the metric in both names."""
    if metric not in metrics:
        return ""
    name, comma, chosen = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{chosen}")
    return f"{metrics[metric]:,.4f}" + (f" ± {error:,.4f}" if error is not None else "")
