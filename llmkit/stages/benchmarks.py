"""Public benchmarks by lm-eval, on the models that evaluate scores: found and checked early, run one after the other, kept.

https://github.com/EleutherAI/lm-evaluation-harness. A benchmark is a task, group or tag that lm-eval knows by name, or the
user's own task file (YAML), whose `!function` code runs, because the user named it. Code from a hub does not run.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmkit.errors import ArtifactError, RecipeError
from llmkit.files import cache_folder, digest_json, read_json, write_json
from llmkit.model.folder import tokenizer_digest, weights_digest
from llmkit.model.loading import load_model, load_tokenizer
from llmkit.model.precision import compute_in, default_device
from llmkit.recipe.schema import Recipe
from llmkit.run.directory import Run
from llmkit.stages.benchmark_files import TaskFile, called, is_file
from llmkit.stages.benchmark_tasks import KEY, SEEDS, load_tasks, own_failures, silence, version

VERSION = 2  # raise it when the same model and benchmark come to give other scores


@dataclass(frozen=True)
class BenchmarkScores:
    """By model and task: the metrics as lm-eval names them, and `examples`; and why others have no value."""

    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)


def benchmark_inputs(recipe: Recipe) -> dict[str, Any]:
    """What decides the scores beside the recipe's keys: the version of lm-eval, and all that the user's own files name."""
    names = recipe.evaluate.benchmarks
    if not names:
        return {}
    return {"lm-eval": version()} | {f"file {Path(n).name}": TaskFile(Path(n)).content for n in names if is_file(n)}


def add_benchmarks(
    results: dict[str, Any], recipe: Recipe, run: Run, folders: Mapping[str, Path], precision: str
) -> None:
    """Adds `benchmarks`, by model and task, to the results of evaluate, and to `reasons` why a score has no value."""
    found = benchmark_scores(recipe, run, folders, precision)
    results["benchmarks"] = found.values
    for who, reasons in found.reasons.items():
        mine = results["reasons"].setdefault(who, {})
        mine |= reasons


def benchmark_scores(recipe: Recipe, run: Run, folders: Mapping[str, Path], precision: str) -> BenchmarkScores:
    """Scores the models in some folders, by name, on the recipe's benchmarks; what was scored before is not again.

    Raises DataError where the data of a benchmark are not to be had, or a task file's own code fails.
    """
    found = BenchmarkScores()
    for who, folder in folders.items() if recipe.evaluate.benchmarks else ():
        scored = _ScoredFolder(recipe, run, who, folder, precision)
        for name in recipe.evaluate.benchmarks:
            values, reasons = scored.scores(name)
            _refuse_twice(name, set(values) & set(found.values.get(who, {})))
            found.values.setdefault(who, {}).update(values)
            if reasons:
                found.reasons.setdefault(who, {}).update(reasons)
    return found


@dataclass
class _ScoredFolder:
    """One model; it is loaded when a benchmark is not kept."""

    recipe: Recipe
    run: Run
    who: str
    folder: Path
    precision: str
    _model: Any = None

    def scores(self, name: str) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
        """Metrics by task, and why others have no value."""
        kept = cache_folder("benchmarks") / f"{self._key(name)[:32]}.json"
        if self.recipe.evaluate.cache and kept.is_file():
            with contextlib.suppress(ArtifactError, KeyError, TypeError):  # a damaged one is computed again
                found = read_json(kept)
                self.run.reporter.note(f"benchmark {called(name)}: the scores of the {self.who} are there from before")
                return found["values"], found["reasons"]
        values, reasons = _without_gaps(self._computed(name))
        if self.recipe.evaluate.cache:
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_json(kept, {"values": values, "reasons": reasons})
        return values, reasons

    def _key(self, name: str) -> str:
        """The digest of all that decides the scores."""
        import transformers

        keys = self.recipe.evaluate
        how = [keys.benchmark_options.model_dump(), keys.batch_size, self.precision, default_device().type]
        what = TaskFile(Path(name)).content if is_file(name) else name
        versions = [VERSION, version(), torch.__version__, transformers.__version__]
        return digest_json([versions, how, what, weights_digest(self.folder), tokenizer_digest(self.folder)])

    def _computed(self, name: str) -> dict[str, Any]:
        """What lm-eval finds, as it writes it."""
        from lm_eval.evaluator import evaluate

        keys, errors = self.recipe.evaluate.benchmark_options, sys.stderr
        with silence():
            model = self._loaded(errors)
        loaded = load_tasks(name)  # after the model: nothing comes between its seeds and the answers
        with silence():
            _prepare(loaded["tasks"], keys.num_fewshot)
            with own_failures(name):
                found: dict[str, Any] = evaluate(
                    lm=model,
                    task_dict=loaded,
                    limit=keys.limit,
                    log_samples=False,
                    apply_chat_template=keys.apply_chat_template,
                    fewshot_as_multiturn=keys.apply_chat_template,
                )
        if model.cut:
            self.run.reporter.warn(
                f"benchmark {called(name)}: the beginning of {model.cut} requests was cut off: too long"
            )
            model.cut = 0
        return found

    def _loaded(self, errors: Any) -> Any:
        if self._model is None:
            from llmkit.stages.benchmark_model import BenchmarkModel

            model = load_model(self.folder, "AutoModelForCausalLM").model.eval()
            compute_in(model, self.precision)
            model.to(default_device())
            self._model = BenchmarkModel(
                model,
                load_tokenizer(self.folder),
                batch_size=self.recipe.evaluate.batch_size,
                precision=self.precision,
                watch=lambda title, count: self._watched(title, count, errors),
            )
        return self._model

    @contextlib.contextmanager
    def _watched(self, title: str, count: int, errors: Any) -> Iterator[Callable[[int], None]]:
        """Progress on the standard error that was there before lm-eval's was put aside."""
        with contextlib.redirect_stderr(errors):
            progress = self.run.reporter.progress(f"benchmarks: {title}, the {self.who}", count, "requests")
            try:
                yield progress.advance
            finally:
                progress.close()


def _prepare(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """Sets examples as the lm_eval command does: a task that has 0 of them by its own file keeps them."""
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=SEEDS["fewshot"])


def _without_gaps(found: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Finite numbers by task and metric; lm-eval's filter stands behind the metric unless it is `none`."""
    values: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for task, metrics in {**found["results"], **found.get("groups", {})}.items():
        own: dict[str, float] = {}
        for key, value in metrics.items():
            if "," not in key or isinstance(value, bool) or not isinstance(value, int | float | np.number):
                continue  # names, and "N/A" for what has no standard error
            metric = key.removesuffix(",none")
            if math.isfinite(value):
                own[metric] = float(value)
            elif "_stderr" not in metric:
                reasons[f"{task}.{metric}"] = f"lm-eval gives {value}"
        if own:
            values[task] = own
        if task in found["n-samples"]:
            values.setdefault(task, {})["examples"] = found["n-samples"][task]["effective"]
    return values, reasons


def _refuse_twice(name: str, tasks: set[str]) -> None:
    if tasks:
        raise RecipeError(
            "two benchmarks have the same task",
            got=", ".join(sorted(tasks)),
            expected="each task once",
            hint=f"leave {called(name)} out, or give its `task:` another name",
            where=KEY,
        )
