"""Cross-validation and learning curves: what several runs of one recipe say together.

Folds share most of what they learn from, so their scores are not independent of each other, and the interval of the mean
is a rough one (Bengio and Grandvalet, "No Unbiased Estimator of the Variance of K-Fold Cross-Validation", JMLR 5, 2004).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from llmkit import catalog
from llmkit.errors import RecipeError, UsageError
from llmkit.files import digest_json, read_json, write_json
from llmkit.model.folder import tokenizer_digest
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import is_share, share
from llmkit.run.directory import Run
from llmkit.stages.base import Stage

CROSSVAL, CURVE, CURVE_RUNS = "crossval.json", "learning_curve.json", "learning-curve"
_TRAINING = ("pretrain", "finetune")
_NOT_A_FOLD = {CROSSVAL, "error.log", "report.html"}
_UNBOUNDED = (-math.inf, math.inf)
RANGES: dict[str, tuple[float, float]] = {  # of the catalogue's metrics: the lowest and the highest possible value
    **dict.fromkeys(("loss", "bits_per_byte", "mae", "mse", "rmse"), (0.0, math.inf)),
    "perplexity": (1.0, math.inf),
    **dict.fromkeys(("token_accuracy", "exact_match", "rouge1", "rouge2", "rougeL", "accuracy", "roc_auc"), (0.0, 1.0)),
    **dict.fromkeys(
        ("balanced_accuracy", "precision", "recall", "f1", "f1_micro", "ece", "ece_calibrated"), (0.0, 1.0)
    ),
    **dict.fromkeys(("bleu", "chrf"), (0.0, 100.0)),
    **dict.fromkeys(("pearson", "spearman"), (-1.0, 1.0)),
    "r2": (-math.inf, 1.0),
}
_PER_TOKEN = ("loss", "perplexity", "token_accuracy")  # what they average over depends on the tokenizer
_WHOLE_EXAMPLES = ("classify", "regress")  # tasks whose loss is of an example, whatever its tokens


@dataclass(frozen=True)
class CrossValidation:
    """The folds of a recipe in a folder: `fold-1` to `fold-K` are runs like any other, `crossval.json` has what they say."""

    recipe: Recipe
    folds: int
    folder: Path

    def check(self) -> None:
        """Raises RecipeError for a recipe that cannot be divided, UsageError for a folder that belongs to something else."""
        data = self.recipe.data
        if data.train is None or data.eval_is_uri or data.eval is None:
            raise RecipeError(
                "cross-validation divides `data.train`, and the recipe holds out something else",
                got="no data.train" if data.train is None else f"data.eval: {data.eval}",
                expected="data.train, and no data.eval",
                hint="--set data.eval=5% makes it a recipe that can be divided; the share itself then has no meaning",
                where="data.eval",
            )
        require_training(self.recipe, "cross-validation")
        if not self.folder.exists():
            return
        if not self.folder.is_dir() or (self.folder / "run.json").exists():
            raise UsageError("folds need a folder of their own", got=self.folder, hint="choose another -o")
        if not (self.folder / CROSSVAL).is_file():
            if strange := [item.name for item in self.folder.iterdir() if item.name not in _NOT_A_FOLD]:
                hint, got = "choose another -o", f"{self.folder}, with {strange[0]} in it"
                raise UsageError("the folder holds something else than folds", got=got, hint=hint)
            return
        before = read_json(self.folder / CROSSVAL)
        mine = (self.recipe.name, self.folds)
        if before.get("done") and (before.get("name"), before.get("folds")) != mine:
            raise UsageError(
                "the folder holds another cross-validation",
                got=f"`{mine[0]}` in {mine[1]} folds",
                expected=f"`{before.get('name')}` in {before.get('folds')} folds",
                hint="choose another -o",
                where=self.folder,
            )

    def settings(self, fold: int) -> tuple[str, ...]:
        """What makes of the recipe that of a 1-based fold, as `--set` takes it."""
        return (f"name={self.recipe.name}", f"data.fold={fold}/{self.folds}", stages_setting(self.recipe))

    def run_of(self, fold: int) -> Path:
        """The run directory of a fold."""
        return self.folder / f"fold-{fold}"

    def begin(self) -> None:
        """Makes the folder this cross-validation's, unless folds of it are done."""
        if not (self.folder / CROSSVAL).is_file() or not read_json(self.folder / CROSSVAL).get("done"):
            self.write(0)

    def write(self, done: int) -> dict[str, Any]:
        """Writes what the first so many folds say, and gives it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        runs: list[dict[str, Any]] = [
            {"fold": n, "run": self.run_of(n).name} | outcome(self.run_of(n)) for n in range(1, done + 1)
        ]
        found: dict[str, Any] = {"name": self.recipe.name, "folds": self.folds, "done": done}
        found |= {"written": datetime.now(UTC).isoformat(timespec="seconds"), "runs": runs}
        if done > 1:
            scores = [run["scores"] for run in runs]
            metrics = _union(fold["model"] for fold in scores)
            names = _incomparable(self.recipe, [self.run_of(n) for n in range(1, done + 1)], metrics)
            found |= over_folds([{who: _without(own, names) for who, own in fold.items()} for fold in scores])
            found |= _left_out(names)
        write_json(self.folder / CROSSVAL, found)
        return found


def take_over(stage_name: str, recipe: Recipe, run: Run, donor: Path) -> bool:
    """Takes a stage from a run in which it was done on the same inputs; False where it is done, or there is none.

    The stages that it needs are done in both. Files are linked where that is possible, and else copied.
    """
    stage: Stage = catalog.resolve("stage", stage_name)
    inputs = {"llmkit's own code": stage.version} | stage.inputs(recipe, run)
    theirs = Run.peek(donor, recipe.name)
    entry = theirs.stage(stage_name)
    if run.stage(stage_name) or entry.get("fingerprint") != digest_json(inputs) or not theirs.is_done(stage_name):
        return False
    for name in entry["files"]:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).unlink(missing_ok=True)
        try:
            os.link(donor / name, run.path / name)
        except OSError:
            shutil.copy2(donor / name, run.path / name)
    run.record["stages"][stage_name] = entry
    run.save()
    return True


def require_training(recipe: Recipe, what: str) -> None:
    """Raises RecipeError for a recipe whose scores would be the same each time."""
    if not set(_TRAINING) & set(recipe.plan):
        raise RecipeError(
            f"{what} trains a model several times, and the recipe trains none",
            got="stages: " + ", ".join(recipe.plan),
            expected="finetune or pretrain among them",
            where="stages",
        )


def stages_setting(recipe: Recipe) -> str:
    """The recipe's stages with evaluate, and without export, as `--set` takes them."""
    stages = [stage for stage in recipe.plan if stage not in ("evaluate", "export")]
    return f"stages=[{', '.join([*stages, 'evaluate'])}]"


def outcome(run: Path) -> dict[str, Any]:
    """What a run's evaluation found: examples held out and learnt from, seconds of all stages, and scores by model.

    Beside the scores stand their intervals, and why others have none.
    """
    record, results = read_json(run / "run.json"), read_json(run / "evaluate" / "results.json")
    stages = record["stages"]
    found: dict[str, Any] = {
        "examples": results["examples"],
        "train_examples": stages["preprocess"]["metrics"].get("train_examples"),
        "seconds": round(sum(stage.get("seconds", 0.0) for stage in stages.values()), 2),
    }
    found["scores"] = {who: results[who] for who in models_of(results)}
    return found | {part: results[part] for part in ("intervals", "reasons") if results.get(part)}


def models_of(results: Mapping[str, Any]) -> list[str]:
    """The models in results.json: the trained one first."""
    own = results.get("model", {})
    others = [
        name
        for name, found in results.items()
        if name != "model" and isinstance(found, dict) and set(found) & set(own) and _are_numbers(found.values())
    ]
    return ["model", *others]


def over_folds(scores: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """By model and metric what the folds' scores are on the whole, and by other model how the trained one differs.

    `values` has an entry for each fold, None where it has no score. Differences are those of the folds in which both
    models have one, and `means` are the means of both over these.
    """
    names = _union(scores)
    found: dict[str, Any] = {who: _by_metric([fold.get(who, {}) for fold in scores]) for who in names}
    pairs = {who: [(fold.get("model", {}), fold.get(who, {})) for fold in scores] for who in names if who != "model"}
    differences = {who: _differences(who, each) for who, each in pairs.items()}
    return {"scores": found} | ({"differences": differences} if differences else {})


def _by_metric(folds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {metric: spread([fold.get(metric) for fold in folds], _range(metric)) for metric in _union(folds)}


def _differences(who: str, pairs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> dict[str, Any]:
    """Of each metric the paired differences between the trained model and another, fold by fold."""
    found = {}
    for metric in _union(ours for ours, _ in pairs):
        both = [(a[metric], b[metric]) if metric in a and metric in b else None for a, b in pairs]
        if not any(both):
            continue
        low, high = _range(metric)
        values = [pair and pair[0] - pair[1] for pair in both]
        ours, theirs = np.mean([pair for pair in both if pair], axis=0).tolist()
        found[metric] = spread(values, (low - high, high - low), differences=True)
        found[metric]["means"] = {"model": ours, who: theirs}
    return found


def _union(names: Iterable[Iterable[str]]) -> list[str]:
    """All names, in the order in which they come."""
    return list(dict.fromkeys(name for some in names for name in some))


def _range(metric: str) -> tuple[float, float]:
    return RANGES.get(metric.removeprefix("general_"), _UNBOUNDED)


def spread(
    values: Sequence[float | None], bounds: tuple[float, float] = _UNBOUNDED, *, differences: bool = False
) -> dict[str, Any]:
    """The mean, the standard deviation (of a sample), and the 95 % interval of the mean by Student's t distribution.

    One value has neither, and None is none. Values that are all alike have no interval, and `why`: so few cannot tell how
    far others would be; only `differences` that are all zero are models that say the same. The interval ends where the
    possible values do.
    """
    from scipy.stats import t

    known = [value for value in values if value is not None]
    count, mean = len(known), float(np.mean(known))
    found: dict[str, Any] = {"values": list(values), "mean": mean, "std": None, "interval": None}
    if count < 2:
        return found
    std = float(np.std(known, ddof=1))
    if math.isclose(min(known), max(known), rel_tol=1e-9) and not (differences and not any(known)):
        why = "all folds differ by the same amount" if differences else "all folds have the same score"
        return found | {"std": 0.0, "why": f"{why}, which does not tell how far others would be"}
    reach = float(t.ppf(0.975, count - 1)) * std / count**0.5
    return found | {"std": std, "interval": [max(mean - reach, bounds[0]), min(mean + reach, bounds[1])]}


def shares_of(text: str) -> tuple[str, ...]:
    """`10%,25%,100%` as shares, smallest first. Raises UsageError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not is_share(part) or not 0 < float(part.rstrip("% ")) <= 100]
    if wrong or not parts:
        raise UsageError(
            "--learning-curve takes shares of the training data",
            got=wrong[0] if wrong else text,
            expected="for example 10%,25%,50%,100%",
            where="--learning-curve",
        )
    return tuple(sorted(dict.fromkeys(f"{share(part) * 100:g}%" for part in parts), key=share))


@dataclass(frozen=True)
class LearningCurve:
    """A run, and beside its stages runs of the same recipe that learn from less; the run itself is the point of 100 %."""

    recipe: Recipe
    shares: tuple[str, ...]
    run: Path

    def check(self) -> None:
        """Raises RecipeError for a recipe that learns nothing, or has a share of its own."""
        require_training(self.recipe, "a learning curve")
        if self.recipe.data.train_share is not None:
            raise RecipeError(
                "a learning curve takes shares of all training data",
                got=f"data.train_share: {self.recipe.data.train_share}",
                hint="leave it out",
                where="data.train_share",
            )

    @property
    def smaller(self) -> tuple[str, ...]:
        """The shares that have runs of their own."""
        return tuple(part for part in self.shares if share(part) < 1)

    def run_of(self, part: str) -> Path:
        """The run directory of a share."""
        return self.run / CURVE_RUNS / f"share-{part.removesuffix('%')}" if part in self.smaller else self.run

    def settings(self, part: str) -> tuple[str, ...]:
        """What makes of the recipe that of a share, as `--set` takes it; others are scored once, with the run itself."""
        return (
            *(f"name={self.recipe.name}", f"data.train_share={part}", "evaluate.against=null"),
            stages_setting(self.recipe),
        )

    def write(self) -> dict[str, Any]:
        """Writes `learning_curve.json` into the run, and gives it: by share the scores and their 95 % intervals."""
        points = []
        for part in self.shares:
            found = outcome(self.run_of(part))
            intervals = found.get("intervals", {}).get("model", {})
            point = {"share": part, "run": str(self.run_of(part).relative_to(self.run))}
            point |= {key: found[key] for key in ("train_examples", "seconds")}
            points.append(point | {"scores": found["scores"]["model"], "intervals": intervals})
        whole = outcome(self.run)
        curve = {"name": self.recipe.name, "examples": whole["examples"], "points": points}
        if "parent" in whole["scores"]:
            intervals = whole.get("intervals", {}).get("parent", {})
            curve["before"] = {"scores": whole["scores"]["parent"], "intervals": intervals}
        curve |= self._leave_out([*points, *([curve["before"]] if "before" in curve else [])])
        write_json(self.run / CURVE, curve)
        return curve

    def _leave_out(self, points: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Takes scores out that other tokenizers make incomparable; gives their names and why, or nothing."""
        names = _incomparable(self.recipe, [self.run_of(part) for part in self.shares], points[0]["scores"])
        for point in points:
            point |= {key: _without(point[key], names) for key in ("scores", "intervals")}
        return _left_out(names)


def _incomparable(recipe: Recipe, runs: Sequence[Path], metrics: Iterable[str]) -> list[str]:
    """The metrics that average over tokens, where the tokenizers of runs differ."""
    digests = {tokenizer_digest(run / "preprocess" / "tokenizer") for run in runs}
    if recipe.task in _WHOLE_EXAMPLES or len(digests) == 1:
        return []
    return [name for name in metrics if name.removeprefix("general_") in _PER_TOKEN]


def _without(scores: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in scores.items() if name not in names}


def _left_out(names: list[str]) -> dict[str, Any]:
    """What is written of metrics that are not compared; nothing where all are."""
    why = "the runs' tokenizers differ, and with them the tokens"
    return {"left_out": {"metrics": names, "why": why}} if names else {}


def _are_numbers(values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
