"""Several runs side by side: scores, losses, cost, and the recipe keys that differ."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmkit.errors import UsageError
from llmkit.report.contestants import Folds, read_contestant, scores, why_no_scores
from llmkit.report.log import Curve
from llmkit.report.recipe_keys import ABSENT, differing_keys
from llmkit.report.record import TRAINING_STAGES, Record
from llmkit.report.words import listed

_OF_ANSWERS = ("generate", "max_new_tokens", "precision")  # keys of `evaluate` that scores depend on
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 24
COSTS = ("train_seconds", "train_tokens", "tokens_per_second", "peak_memory_bytes", "flops")


@dataclass(frozen=True)
class Comparison:
    """Runs with a name for each; `notes` say what cannot be compared, and why."""

    names: tuple[str, ...]
    records: tuple[Record, ...]
    comparable: bool
    notes: tuple[str, ...]
    keys: dict[str, tuple[Any, ...]]  # dotted recipe key -> its value in each run, or ABSENT

    @property
    def metrics(self) -> list[str]:
        """All metrics that any of the runs has, in the order of the first that has it."""
        return list(dict.fromkeys(metric for record in self.records for metric in scores(record)))

    @property
    def stages(self) -> list[str]:
        """The stages that train for which any of the runs has a curve."""
        return [stage for stage in TRAINING_STAGES if any(stage in record.log.curves for record in self.records)]


def compare(paths: Sequence[Path]) -> Comparison:
    """Reads runs and folders of folds.

    Raises UsageError for fewer than two, one given twice, or what is neither; ArtifactError when damaged.
    """
    if len(paths) < 2:
        raise UsageError(
            "there is nothing to compare with", got=listed([str(p) for p in paths]), expected="two runs or more"
        )
    for path, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise UsageError("a run is given twice", got=path, expected="different runs")
    records = tuple(read_contestant(path) for path in paths)
    names = _names(records)
    keys = differing_keys(records)
    if "data.fold" in keys:
        folds = zip(records, keys["data.fold"], strict=True)
        keys["data.fold"] = tuple(record.fold if isinstance(record, Folds) else value for record, value in folds)
    notes, comparable = _notes(names, records, keys)
    return Comparison(names, records, comparable, tuple(notes), keys)


def score_interval(record: Record, metric: str) -> Any:
    """The interval of a score, or None."""
    return ((record.results or {}).get("intervals") or {}).get("model", {}).get(metric)


def losses(record: Record, stage: str) -> dict[str, Any]:
    """Where the curves of a stage ended, and the lowest held-out loss."""
    found: dict[str, Any] = {}
    train, held_out = record.log.curve(stage, "loss"), record.log.curve(stage, "eval_loss")
    if train is not None:
        steps = record.metrics(stage).get("steps", train.last[0])  # not each one is in the log
        found |= {"steps": steps, "last_train_loss": train.last[1]}
    if held_out is not None:
        found |= {"last_eval_loss": held_out.last[1]}
        found |= {"best_eval_loss": held_out.lowest[1], "best_step": held_out.lowest[0]}
    return found


def costs(record: Record) -> dict[str, Any]:
    """Seconds of all stages, and of the training stages tokens, speed and the most memory."""
    found: dict[str, Any] = {"seconds": round(record.seconds, 2)}
    measured = [metrics for stage in TRAINING_STAGES if (metrics := record.metrics(stage))]
    for key in ("train_seconds", "train_tokens", "flops"):
        values = [metrics[key] for metrics in measured if isinstance(metrics.get(key), int | float)]
        if values:
            found[key] = sum(values)
    if found.get("train_seconds") and "train_tokens" in found:
        found["tokens_per_second"] = round(found["train_tokens"] / found["train_seconds"], 1)
    peaks = [metrics["peak_memory_bytes"] for metrics in measured if metrics.get("peak_memory_bytes")]
    if peaks:
        found["peak_memory_bytes"] = max(peaks)
    return found


def sparkline(curve: Curve, width: int = _SPARK_WIDTH) -> str:
    """A curve as a row of blocks."""
    means = curve.points(width).mean
    low, high = float(means.min()), float(means.max())
    span = (high - low) or 1.0
    return "".join(_SPARKS[min(int((value - low) / span * len(_SPARKS)), len(_SPARKS) - 1)] for value in means)


def shown_value(value: Any) -> str:
    """A value of a recipe as text."""
    if value is ABSENT:
        return ""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10_000)).removesuffix("...\n").strip()


def comparison_json(found: Comparison) -> dict[str, Any]:
    """All of it for scripts."""
    runs = []
    for name, record in zip(found.names, found.records, strict=True):
        intervals = {metric: bounds for metric in scores(record) if (bounds := score_interval(record, metric))}
        stages = {stage: {k: entry.get(k) for k in ("state", "seconds")} for stage, entry in record.stages.items()}
        runs.append(
            {
                "run_dir": str(record.path),
                "name": name,
                "task": record.task,
                "held_out": record.held_out,
                "examples": (record.results or {}).get("examples"),
                "scores": scores(record),
                "intervals": intervals,
                "losses": {stage: losses(record, stage) for stage in found.stages},
                "cost": costs(record),
                "stages": stages,
            }
        )
    keys = {key: [None if value is ABSENT else value for value in values] for key, values in found.keys.items()}
    return {"comparable": found.comparable, "notes": list(found.notes), "runs": runs, "recipe_differences": keys}


def _names(records: Sequence[Record]) -> tuple[str, ...]:
    """What each run is called: its recipe's name where no other has it, else its folder, else its whole path."""
    for choice in (lambda r: r.name, lambda r: r.path.resolve().name, lambda r: str(r.path)):
        names = tuple(choice(record) for record in records)
        if len(set(names)) == len(names):
            return names
    return names


def _notes(
    names: Sequence[str], records: Sequence[Record], keys: Mapping[str, tuple[Any, ...]]
) -> tuple[list[str], bool]:
    """What stands in the way of comparing scores."""
    notes = []
    for what, values in (
        ("tasks", [record.task for record in records]),
        ("held-out data", [record.held_out or "" for record in records]),
    ):
        groups: dict[str, list[str]] = defaultdict(list)
        for name, value in zip(names, values, strict=True):
            groups[value].append(name)
        if len(groups) > 1:
            told = "; ".join(f"{value or 'none'}: {listed(some)}" for value, some in groups.items())
            if what == "held-out data":
                told = " against ".join(listed(some) for some in groups.values())
                told += " (other examples, or the same ones in another tokenizer's tokens)"
            notes.append(f"Scores cannot be compared: the {what} differ: {told}.")
    comparable = not notes
    for name, record in zip(names, records, strict=True):
        if not scores(record):
            notes.append(f"{name} has no scores: {why_no_scores(record)}")
        if isinstance(record, Folds):
            notes.append(f"{name} is {record.about}.")
    other = [f"evaluate.{key}" for key in _OF_ANSWERS if f"evaluate.{key}" in keys]
    if comparable and other:
        notes.append(f"Some scores may not be comparable: {listed(other)} differ.")
    return notes, comparable
