"""How results look on a terminal: scores side by side, sample answers, what to type next."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from llmkit.cli.console import make_table
from llmkit.recipe.schema import Recipe
from llmkit.run.directory import Run


def show_metrics(console: Console, title: str, metrics: dict[str, Any]) -> None:
    """What one stage measured."""
    rows = [(key, _readable(key, value)) for key, value in metrics.items() if value is not None]
    console.print(make_table(title, ("", ""), rows))


def show_results(console: Console, results: dict[str, Any]) -> None:
    """Scores side by side, then the sample prompts with each model's answer."""
    other = next((name for name in ("parent", "other") if name in results), None)
    columns = ["metric"] + ([other] if other else []) + ["model"] + (["change"] if other else [])
    rows = []
    for metric, value in results["model"].items():
        before = [results[other].get(metric)] if other else []
        change = [f"{value - before[0]:+.4f}"] if before else []
        rows.append([metric, *(f"{b:.4f}" for b in before), f"{value:.4f}", *change])
    console.print()
    console.print(make_table(f"held-out scores over {results['examples']} examples", columns, rows))
    prompts = _without_common_parts([sample["prompt"] for sample in results["samples"]])
    for sample, prompt in zip(results["samples"], prompts, strict=True):
        console.print(f"\n[dim]prompt[/]     {escape(prompt)}")
        console.print(f"[dim]reference[/]  {escape(sample['reference'])}")
        for name, label in (("parent", "before"), ("other", "other"), ("model", "after" if other else "answer")):
            if name in sample:
                console.print(f"[dim]{label:<9}[/]  {escape(sample[name])}")


def _without_common_parts(prompts: list[str], longest: int = 600) -> list[str]:
    """Prompts without the lines that all of them begin and end with: the template, the instruction."""
    split = [prompt.split("\n") for prompt in prompts]
    fewest = min(map(len, split), default=0)
    same = [len({lines[number] for lines in split}) == 1 for number in range(fewest)]
    same_from_end = [len({lines[-1 - number] for lines in split}) == 1 for number in range(fewest)]
    start = next((n for n, equal in enumerate(same) if not equal), 0)
    end = next((n for n, equal in enumerate(same_from_end) if not equal), 0)
    texts = ["\n           ".join(lines[start : len(lines) - end]) for lines in split]
    return [text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}" for text in texts]


def show_next(console: Console, run: Run, recipe: Recipe) -> None:
    """What to type next."""
    commands = []
    if recipe.task != "classify":
        raw = "" if recipe.task == "chat" else " --raw"
        commands.append(f'llmkit generate {run.path} "your prompt"{raw}')
    commands.append(f"llmkit run {run.path}     runs only what a change of the recipe or the data touches")
    for number, command in enumerate(commands):
        console.print(f"{'' if number else 'next':<6}{escape(command)}")


def _readable(key: str, value: Any) -> str:
    """A metric with its unit."""
    if key.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if key.endswith("_per_second"):
        return f"{value:,.0f}"
    if key.endswith("seconds"):
        return f"{value:,.1f} s"
    if isinstance(value, float):
        return f"{value:,.4f}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
