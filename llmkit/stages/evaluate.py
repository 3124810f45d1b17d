"""evaluate: the task's metrics on held-out data, for the model and what it is held against, side by side."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.data.corpus import Corpus
from llmkit.errors import ArtifactError, Problem, RecipeError, did_you_mean
from llmkit.files import digest_json, write_json
from llmkit.model.folder import weights_digest
from llmkit.model.loading import build_on_meta, load_config, load_model
from llmkit.model.location import locate
from llmkit.model.precision import choose_precision, compute_in, default_device
from llmkit.recipe.schema import Recipe, result_keys
from llmkit.run.directory import Artifact, Run
from llmkit.stages.base import (
    corpus_in,
    model_before,
    model_content,
    require_corpus,
    task_class,
    task_for,
    upstream_models,
)
from llmkit.stages.prefix import depth_for_good, known_to_score
from llmkit.stages.prefix_cache import Alone, PrefixCache
from llmkit.tasks.base import Known, Scores, Scoring, Task
from llmkit.train.state import seed_everything


class Evaluate:
    """Scores the newest model of the recipe, and its parent."""

    name = "evaluate"
    version = 1
    trains = False
    resumes = False
    distributed = False

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """The held-out corpus and the model."""
        return ("preprocess", *reversed(upstream_models(recipe, self.name)))

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """The held-out corpus, both models' weights, and the keys of `evaluate`."""
        against = _against(recipe)
        return {f"recipe.evaluate.{key}": value for key, value in result_keys(recipe.evaluate).items()} | {
            "recipe.task": recipe.task,
            "recipe.seed": recipe.seed,
            "held out": _corpora(run).get(_corpus_name(run)),
            "general text": _corpora(run).get("general"),
            "model": model_content(recipe, run, self.name),
            "against": weights_digest(locate(against)) if against else None,
        }

    def run(self, recipe: Recipe, run: Run) -> Artifact:
        """Writes `results.json`: metrics of the model and of what it is held against, tables and sample answers."""
        corpus = require_corpus(run, _corpus_name(run), "data.eval")
        task = task_for(recipe, run, corpus, "text" if _corpus_name(run) == "pretrain-eval" else None)
        precision, why = choose_precision(recipe.evaluate.precision, default_device())
        if why:
            run.guess("evaluate.precision", precision, why)
        scoring = scoring_for(recipe, len(corpus), precision)
        folders = {"model": model_before(recipe, run, self.name)}
        against = _against(recipe)
        if against is not None:
            folders["parent" if recipe.evaluate.against == "parent" else "other"] = locate(against)
        general = corpus_in(run, "general")
        plain = task_for(recipe, run, general, "text") if general is not None else None
        scores = {}
        for name, source in folders.items():
            scores[name] = _score(recipe, run, task, corpus, scoring, source, name)
            if general is not None and plain is not None:
                whole = replace(scoring, metrics=plain.metrics, generate=0, samples=0)
                found = _score(recipe, run, plain, general, whole, source, f"{name} on general text").metrics
                more = {f"general_{metric}": value for metric, value in found.items()}
                scores[name] = replace(scores[name], metrics=scores[name].metrics | more)
        folder = run.folder(self.name)
        results: dict[str, Any] = {name: found.metrics for name, found in scores.items()}
        results["examples"] = len(corpus)
        results["tables"] = {name: found.tables for name, found in scores.items() if found.tables}
        results["samples"] = _samples(scores)
        write_json(folder / "results.json", results)
        metrics = {f"{name}.{key}": value for name, found in scores.items() for key, value in found.metrics.items()}
        return Artifact(
            self.name, folder / "results.json", digest_json(results), (f"{self.name}/results.json",), metrics
        )


STAGE = Evaluate()


def wanted_metrics(recipe: Recipe) -> tuple[str, ...]:
    """The metrics that the recipe asks for. Raises RecipeError naming all that its task has not."""
    known, wanted = task_class(recipe).metrics, recipe.evaluate.metrics
    if wanted == "auto":
        return known
    problems = [
        Problem(
            f"the task {recipe.task} has no metric `{name}`",
            got=name,
            expected="one of " + ", ".join(known),
            hint=did_you_mean(name, known),
            where="evaluate.metrics",
        )
        for name in wanted
        if name not in known
    ]
    if problems:
        raise RecipeError(problems[0].what, problems=problems)
    return tuple(wanted)


def scoring_for(recipe: Recipe, examples: int, precision: str) -> Scoring:
    """How this recipe scores a model that computes in `precision`. Raises RecipeError as `wanted_metrics` does."""
    keys, device = recipe.evaluate, default_device()
    return Scoring(
        device=device,
        precision=precision,
        batch_size=keys.batch_size,
        metrics=wanted_metrics(recipe),
        generate=min(keys.generate, examples),
        max_new_tokens=keys.max_new_tokens,
        samples=min(keys.samples, examples),
    )


def _score(recipe: Recipe, run: Run, task: Task, corpus: Corpus, scoring: Scoring, folder: Path, name: str) -> Scores:
    """Loads a model and scores it. A new head (a parent that never saw these labels) is seeded, and said to be new."""
    seed_everything(recipe.seed)
    loaded = load_model(folder, task.auto_class, **task.model_changes(load_config(folder)))
    if loaded.new_parameters:
        run.reporter.note(
            f"the {name} has no trained {', '.join(loaded.new_parameters)}: its scores are those of chance"
        )
    model = loaded.model.to(scoring.device).eval()
    compute_in(model, scoring.precision)
    scoring = replace(scoring, objective=task.objective(model))
    known = _known(recipe, run, task, model, corpus, scoring, name)
    progress = run.reporter.progress(f"scoring the {name}", task.work(corpus, scoring), "examples")
    try:
        scores = task.evaluate(model, corpus, replace(scoring, advance=progress.advance, known=known))
    finally:
        progress.close()
    wrong = [f"{metric} {value}" for metric, value in scores.metrics.items() if not math.isfinite(value)]
    if wrong:
        raise ArtifactError(
            f"the {name}'s scores are not finite numbers",
            got=", ".join(wrong),
            expected="finite weights and a loss",
            hint="its training diverged, or its files are damaged; evaluate.precision: fp32 rules out the precision",
            where=folder,
        )
    return scores


def _known(
    recipe: Recipe, run: Run, task: Task, model: Any, corpus: Corpus, scoring: Scoring, name: str
) -> Known | None:
    """What leaves the frozen blocks for each example, where that is kept already or both models have the same."""
    if recipe.freeze is None or recipe.freeze.cache is False:
        return None
    ours = load_config(model_before(recipe, run, "evaluate"))
    depth = depth_for_good(recipe, run, build_on_meta(ours, task.auto_class))
    if not depth:
        return None
    keys = recipe.freeze.model_copy(update={"cache_precision": "auto"})  # training may take rounded states, scores not
    cache = PrefixCache(keys, run, scoring.objective, model, task.size_column, scoring.precision, Alone())
    alike = recipe.evaluate.against == "parent" and upstream_models(recipe, "evaluate") == ("finetune",)
    return known_to_score(cache, corpus, depth, 2 if alike else 1, f"the held-out data for the {name}")


def _samples(scores: dict[str, Scores]) -> list[dict[str, str]]:
    """The same prompts with the answers of each model."""
    first = scores["model"].samples
    return [
        {"prompt": sample["prompt"], "reference": sample["reference"]}
        | {name: found.samples[number]["answer"] for name, found in scores.items()}
        for number, sample in enumerate(first)
    ]


def _against(recipe: Recipe) -> str | None:
    """The URI of the model to hold against; None when there is none, or when it would be the same one."""
    against = recipe.evaluate.against
    if against != "parent":
        return against
    return recipe.model if upstream_models(recipe, "evaluate") else None


def _corpora(run: Run) -> dict[str, str]:
    found: dict[str, str] = run.stage("preprocess")["facts"]["corpora"]
    return found


def _corpus_name(run: Run) -> str:
    """`eval`, or the held-out part of the pretraining text when the recipe has no other data."""
    return "eval" if "eval" in _corpora(run) else "pretrain-eval"
