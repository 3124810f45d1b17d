"""What can be compared: a run, or a folder of folds, which counts as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmkit.errors import UsageError
from llmkit.files import digest_json, read_json
from llmkit.report.folds import CROSSVAL
from llmkit.report.record import TRAINING_STAGES, Record, read_record, reading

_NO_FAILURES = ("done", "running", "stopped")
_SUMS = ("train_seconds", "train_tokens", "flops")  # over folds; of memory the most counts


@dataclass(frozen=True)
class Folds(Record):
    """A cross-validation as one run: scores are means over its folds, times and tokens their sums."""

    found: Mapping[str, Any]  # crossval.json
    folds: tuple[Record, ...]

    @cached_property
    def results(self) -> dict[str, Any] | None:
        """The means with their intervals."""
        own = self.found["scores"]["model"]
        return {
            "model": {metric: each["mean"] for metric, each in own.items()},
            "intervals": {"model": {metric: each["interval"] for metric, each in own.items() if each["interval"]}},
            "examples": sum(run["examples"] for run in self.found["runs"]),
        }

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Of each stage the sums; one that a fold took over from another counts once."""
        return {name: _summed([fold.stages.get(name, {}) for fold in self.folds]) for name in self.folds[0].stages}

    @property
    def held_out(self) -> str | None:
        """A digest of what all folds hold out."""
        return digest_json([fold.held_out for fold in self.folds])

    @property
    def fold(self) -> str:
        """Which of how many its numbers are of."""
        return f"1/{self.found['folds']} to {self.found['done']}/{self.found['folds']}"

    @property
    def about(self) -> str:
        """What its scores and costs are."""
        done, folds = self.found["done"], self.found["folds"]
        over = f"{done} folds" if done == folds else f"the {done} of {folds} folds that are done"
        return f"a cross-validation: its scores are means over {over}, its costs their sums"


def read_contestant(path: Path) -> Record:
    """Reads a run or a folder of folds. Raises UsageError for what is neither, and ArtifactError when damaged."""
    record = _read_folds(path) if (path / CROSSVAL).is_file() else read_record(path)
    with reading(path / CROSSVAL if isinstance(record, Folds) else path):
        scores(record)
    return record


def scores(record: Record) -> dict[str, float]:
    """The scores of a run's own model."""
    found = (record.results or {}).get("model") or {}
    return {metric: value for metric, value in found.items() if isinstance(value, int | float)}


def _read_folds(path: Path) -> Folds:
    """A folder of folds. Raises UsageError where too few are done for a mean."""
    found: Any = read_json(path / CROSSVAL)
    with reading(path / CROSSVAL):
        if found["done"] < 2:
            raise UsageError(
                "the cross-validation has no mean yet",
                got=f"{found['done']} of {found['folds']} folds done",
                expected="two folds or more that are done",
                hint="the same `llmkit crossval` command goes on with it",
                where=path,
            )
        folds = tuple(read_record(path / run["run"]) for run in found["runs"])
        record = Folds(path, {"name": found["name"]}, folds[0].recipe, folds[0].recipe_text, found, folds)
        assert record.results is not None
        return record


def _summed(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [entry for number, entry in enumerate(entries) if entry not in entries[:number]]
    measured = [entry.get("metrics") or {} for entry in own]
    metrics: dict[str, Any] = {}
    for key in _SUMS:
        if values := [each[key] for each in measured if isinstance(each.get(key), int | float)]:
            metrics[key] = sum(values)
    if peaks := [each["peak_memory_bytes"] for each in measured if each.get("peak_memory_bytes")]:
        metrics["peak_memory_bytes"] = max(peaks)
    seconds = round(sum(entry.get("seconds") or 0.0 for entry in own), 2)
    return {"state": entries[0].get("state"), "seconds": seconds, "metrics": metrics}


def why_no_scores(record: Record) -> str:
    """What makes them, where something does, or why nothing can."""
    recipe = record.recipe
    stages = recipe.get("stages") or ["preprocess", "finetune", "evaluate"]
    trains = [stage for stage in TRAINING_STAGES if stage in stages]
    if not trains and not recipe.get("model"):
        return "its recipe has no model and trains none."
    if (recipe.get("data") or {}).get("eval", "5%") is None and "pretrain" not in stages:
        return "its recipe holds out no data."
    failed = [stage for stage, entry in record.stages.items() if entry.get("state") not in _NO_FAILURES]
    if failed:
        return f"its {failed[-1]} failed; `llmkit runs {record.path}` says how to go on."
    if all(record.is_done(stage) for stage in trains):
        return f"`llmkit evaluate {record.path}` makes them."
    last = "" if "evaluate" in stages else f", and then `llmkit evaluate {record.path}`,"
    return f"`llmkit run {record.path}`{last} makes them."
