"""Everything that a run directory tells of a run, read without changing or locking it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from llmkit.data.personal.masking import without_secrets
from llmkit.errors import ArtifactError, UsageError
from llmkit.files import read_json
from llmkit.report.log import TrainingLog, read_log

TRAINING_STAGES = ("pretrain", "finetune")


@dataclass(frozen=True)
class Record:
    """A run as it stands; what it has not got is None or empty."""

    path: Path
    run: Mapping[str, Any]
    recipe: Mapping[str, Any]
    recipe_text: str

    @property
    def name(self) -> str:
        """The recipe's name."""
        return str(self.run.get("name", self.path.name))

    @property
    def task(self) -> str:
        """The recipe's task, or nothing."""
        return str(self.recipe.get("task") or "")

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What run.json says of each stage that has been started, in the order of the pipeline."""
        known = self.run.get("stages", {})
        order = ("preprocess", "pretrain", "freeze", "finetune", "evaluate", "export")
        return {name: known[name] for name in order if name in known}

    def is_done(self, stage: str) -> bool:
        """True when run.json says so."""
        return bool(self.stages.get(stage, {}).get("state") == "done")

    @property
    def only_scores(self) -> bool:
        """True for a run that evaluates a model and trains none."""
        return "evaluate" in self.stages and not any(stage in self.stages for stage in TRAINING_STAGES)

    @property
    def adapter(self) -> dict[str, Any] | None:
        """What the recipe says of the adapters that fine-tuning trains; None where it trains the weights."""
        found = (self.recipe.get("finetune") or {}).get("adapter")
        return found if isinstance(found, dict) else None

    @property
    def learning_parameters(self) -> int | None:
        """How many parameters fine-tuning trains; what the freeze plan leaves free before it has begun to."""
        groups = self.facts("finetune").get("parameter_groups") or []
        if groups:
            return sum(int(row[2]) for row in groups)
        planned = None if self.adapter else self.metrics("freeze").get("trainable_parameters")
        return None if planned is None else int(planned)

    def metrics(self, stage: str) -> dict[str, Any]:
        """What a stage measured."""
        return dict(self.stages.get(stage, {}).get("metrics") or {})

    def facts(self, stage: str) -> dict[str, Any]:
        """What else it noted."""
        return dict(self.stages.get(stage, {}).get("facts") or {})

    @cached_property
    def log(self) -> TrainingLog:
        """Curves and events of the stages that train."""
        return read_log(self.path / "metrics.jsonl")

    @cached_property
    def statistics(self) -> dict[str, Any] | None:
        """What preprocess counted."""
        return self._json("preprocess", "statistics.json")

    @cached_property
    def freeze(self) -> dict[str, Any] | None:
        """The freeze plan."""
        return self._json("freeze", "freeze.json")

    @cached_property
    def results(self) -> dict[str, Any] | None:
        """Scores and all that belongs to them."""
        return self._json("evaluate", "results.json")

    @cached_property
    def learning_curve(self) -> dict[str, Any] | None:
        """The scores by share of the training data, where `--learning-curve` made them."""
        path = self.path / "learning_curve.json"
        return _checked(path) if path.is_file() else None

    @property
    def predictions(self) -> Path | None:
        """The file with what each model said of each held-out example."""
        path = self.path / "evaluate" / "predictions.jsonl"
        return path if self.is_done("evaluate") and path.is_file() else None

    @property
    def others(self) -> list[str]:
        """The models that the results hold the run's own against: `parent`, and others."""
        found = self.results or {}
        if isinstance(found.get("models"), list):
            return [str(name) for name in found["models"] if name != "model" and isinstance(found.get(name), dict)]
        return [name for name in ("parent", "other") if isinstance(found.get(name), dict)]

    @property
    def held_out(self) -> str | None:
        """The digest of the held-out corpus; None when there is none."""
        corpora = self.facts("preprocess").get("corpora") or {}
        found = corpora.get("eval") or corpora.get("pretrain-eval")
        return None if found is None else str(found)

    @property
    def seconds(self) -> float:
        """What all stages that are done took together."""
        return float(sum(entry.get("seconds") or 0.0 for entry in self.stages.values()))

    def _json(self, stage: str, file: str) -> dict[str, Any] | None:
        """A file of a stage that is done, so that it belongs to what run.json says."""
        path = self.path / stage / file
        return _checked(path) if self.is_done(stage) and path.is_file() else None


def read_record(path: Path) -> Record:
    """Opens a run directory to read. Raises UsageError when it is none, and ArtifactError when run.json is damaged."""
    if not (path / "run.json").is_file():
        inside = sorted(found.parent for found in path.glob("*/run.json"))
        raise UsageError(
            "this is not a run directory",
            got=path if path.is_dir() else f"{path} is a file" if path.exists() else f"{path} does not exist",
            expected="a folder with a run.json, as `llmkit run` leaves one",
            hint=f"there are runs in it, such as {inside[0]}"
            if inside
            else "a run lies in runs/NAME, or where -o said",
            where=path,
        )
    run = read_json(path / "run.json")
    with reading(path / "run.json"):
        for entry in _mapping(_mapping(run).get("stages", {})).values():
            _mapping(entry)
    file = path / "recipe.yaml"
    text, recipe = "", None
    if file.is_file():
        try:
            text = without_secrets(file.read_text(encoding="utf-8"))
            recipe = yaml.safe_load(text)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ArtifactError("the recipe of the run is damaged", got=error, expected="YAML", where=file) from None
    return Record(path, run, recipe if isinstance(recipe, dict) else {}, text)


def _checked(path: Path) -> dict[str, Any]:
    found: Any = read_json(path)
    with reading(path):
        return _mapping(found)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, got {type(value).__name__}")
    return value


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a file of another form makes Python raise into ArtifactError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            "a file of the run is damaged",
            got=f"{type(error).__name__}: {error}",
            expected="what this version of llmkit writes",
            hint="run the stage again",
            where=path,
        ) from error
