"""evaluate: the task's metrics on held-out data, for the model and what it is held against, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmkit.catalog import is_own_code
from llmkit.data.corpus import Corpus
from llmkit.data.own_code import OwnCode
from llmkit.data.sources import source_digest
from llmkit.errors import Problem, RecipeError, did_you_mean
from llmkit.files import digest_file, digest_json, write_json
from llmkit.metrics.statistic import Predictions
from llmkit.model.folder import weights_digest
from llmkit.model.loading import build_on_meta, load_config
from llmkit.model.location import locate
from llmkit.model.precision import default_device
from llmkit.recipe.schema import Recipe, result_keys
from llmkit.run.directory import Artifact, Run
from llmkit.stages.against import others, refuse_no_text, refuse_other_kinds
from llmkit.stages.base import (
    corpus_in,
    model_before,
    model_content,
    precision_for,
    require_corpus,
    task_class,
    task_for,
    upstream_models,
)
from llmkit.stages.benchmarks import add_benchmarks, benchmark_inputs
from llmkit.stages.comparison import Comparing, Comparison
from llmkit.stages.data_sets import data_set, data_set_folder, train_sample
from llmkit.stages.evaluation_results import (
    HELD_OUT,
    add_general,
    all_gaps,
    flat_metrics,
    results_of,
    scored_slices,
    write_predictions,
)
from llmkit.stages.predictions import make_room
from llmkit.stages.prefix import depth_for_good, known_to_score
from llmkit.stages.prefix_cache import Alone, PrefixCache
from llmkit.stages.scoring import DataSet, ScoredModel
from llmkit.stages.slices import grouped, slices_of
from llmkit.tasks.base import Known, Scoring, Task
from llmkit.tasks.scoring import metric_key, metric_named


class Evaluate:
    """Scores the newest model of the recipe, its parent and other models, and says how sure the scores are."""

    name = "evaluate"
    version = 3
    trains = False
    resumes = True
    distributed = False
    shares = True

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """The held-out corpus and the model."""
        return ("preprocess", *reversed(upstream_models(recipe, self.name)))

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """The corpora, all models' weights, the user's own files, and the keys of `evaluate`.

        Raises RecipeError as `check` does, before anything is moved out of the way.
        """
        self.check(recipe, run)
        keys, corpora = recipe.evaluate, _corpora(run)
        found = {f"recipe.evaluate.{key}": value for key, value in result_keys(keys).items() if key != "data_sets"} | {
            "recipe.task": recipe.task,
            "recipe.seed": recipe.seed,
            "held out": corpora.get(_corpus_name(run)),
            "general text": corpora.get("general"),
            "model": model_content(recipe, run, self.name),
            "models to hold against": {name: weights_digest(locate(uri)) for name, uri in others(recipe).items()},
            "further data sets": {name: source_digest(uri) for name, uri in keys.data_sets.items()},
        }
        if keys.train_sample:
            found["training data"] = corpora.get("pretrain" if _corpus_name(run) == "pretrain-eval" else "train")
        for path in map(OwnCode.path_of, filter(is_own_code, keys.metrics)):
            found[f"the file {path.name}"] = digest_file(path) if path.is_file() else None
        return found | benchmark_inputs(recipe)

    def check(self, recipe: Recipe, run: Run) -> None:
        """Raises RecipeError for models that cannot be scored on the same examples, and for slices that the data have not."""
        _refuse_unfit(recipe, run)
        corpus = corpus_in(run, _corpus_name(run)) if recipe.evaluate.slices and run.is_done("preprocess") else None
        if corpus is not None:
            task, scoring = _task(recipe, run, corpus), scoring_for(recipe, len(corpus), "fp32")
            slices_of(recipe, DataSet(HELD_OUT, "the held-out data", task, corpus, np.arange(len(corpus)), scoring))

    def share(self, recipe: Recipe, run: Run, process: int, processes: int) -> None:
        """Scores this process's examples and keeps the scores, where the first process finds them."""
        from accelerate import PartialState

        if not recipe.evaluate.cache:
            return
        with PartialState().main_process_first():
            data = _data(recipe, run, read_only=process > 0)
        for model, each in _work(_models(recipe, run), data):
            model.keep_scores(each.share(process, processes))

    def run(self, recipe: Recipe, run: Run) -> Artifact:
        """Writes `results.json` and, for each data set, `predictions*.jsonl`, with what each model said of each example.

        What was scored before is not scored again, whichever run it was in; a kill loses a batch.
        """
        if "parent" in recipe.evaluate.models and "parent" not in others(recipe):
            run.reporter.note("nothing is held against a parent: this recipe trains nothing, or from scratch")
        data = _data(recipe, run)
        slices = slices_of(recipe, data[HELD_OUT])
        models = _models(recipe, run)
        folder = run.folder(self.name)
        predictions = _predictions(data, models)
        comparisons: dict[str, Comparison] = {}
        results: dict[str, Any] = {}
        for name, each in data.items():
            compare = Comparing(each.scoring.metrics, recipe.evaluate.resamples, recipe.seed)
            comparisons[name] = compare(predictions[name], name)
            suffix = "" if name == HELD_OUT else f"-{name}"
            write_predictions(folder / f"predictions{suffix}.jsonl", each, predictions[name])
            if name == HELD_OUT:
                results = results_of(each, comparisons[name], predictions[name])
                results["slices"] = scored_slices(slices, predictions[name], compare)
        make_room({folder for model in models for folder in model.kept})
        if untrained := {model.name: list(model.untrained) for model in models if model.untrained}:
            results["untrained"] = untrained
        add_general(results, comparisons.pop("general", None))
        results["data_sets"] = {name: found.json() for name, found in comparisons.items() if name != HELD_OUT}
        results["gaps"] = all_gaps(comparisons)
        folders, precision = {model.name: model.folder for model in models}, data[HELD_OUT].scoring.precision
        add_benchmarks(results, recipe, run, folders, precision)
        write_json(folder / "results.json", results)
        files = ("results.json", *(path.name for path in sorted(folder.glob("predictions*.jsonl"))))
        metrics = flat_metrics(results, [model.name for model in models])
        made = tuple(f"{self.name}/{name}" for name in files)
        return Artifact(self.name, folder / "results.json", digest_json(results), made, metrics)


STAGE = Evaluate()


def wanted_metrics(recipe: Recipe) -> tuple[str, ...]:
    """The metrics that the recipe asks for. Raises RecipeError naming all that its task has not."""
    known, wanted = task_class(recipe).metrics, recipe.evaluate.metrics
    if wanted == "auto":
        return known
    problems = []
    for name in wanted:
        if is_own_code(name):
            problems += _wrong_own_metric(recipe, name)
        elif name not in known:
            expected = "one of " + ", ".join(known) + ", or your own as path.py:function"
            what, hint = f"the task {recipe.task} has no metric `{name}`", did_you_mean(name, known)
            problems.append(Problem(what, got=name, expected=expected, hint=hint, where="evaluate.metrics"))
    twice = [key for key, count in Counter(map(metric_key, wanted)).items() if count > 1]
    problems += [Problem(f"the metric `{key}` is named twice", got=key, where="evaluate.metrics") for key in twice]
    if problems:
        raise RecipeError(problems[0].what, problems=problems)
    return tuple(wanted)


def _wrong_own_metric(recipe: Recipe, name: str) -> list[Problem]:
    """What is wrong with the user's metric before it is called."""
    try:
        metric_named(name)
    except RecipeError as error:
        return list(error.problems)
    if recipe.task == "text":
        what = f"the metric `{name}` compares answers with references, and the task text has neither"
        return [
            Problem(what, got=name, expected="a task with answers, such as chat or classify", where="evaluate.metrics")
        ]
    return []


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


def _data(recipe: Recipe, run: Run, *, read_only: bool = False) -> dict[str, DataSet]:
    """All data to score: what is held out, general text, further data sets, and a sample of what was learnt from.

    With `read_only`, the further ones are there already.
    """
    name = _corpus_name(run)
    corpus = require_corpus(run, name, "data.eval")
    task = _task(recipe, run, corpus)
    precision = precision_for(run, "evaluate", recipe.evaluate.precision, default_device())
    scoring = scoring_for(recipe, len(corpus), precision)
    found = {HELD_OUT: DataSet(HELD_OUT, "the held-out data", task, corpus, np.arange(len(corpus)), scoring)}
    general = corpus_in(run, "general")
    if general is not None:
        plain = task_for(recipe, run, general, "text")
        whole = replace(scoring, metrics=plain.metrics, generate=0, samples=0)
        found["general"] = DataSet("general", "general text", plain, general, np.arange(len(general)), whole)
    for own in recipe.evaluate.data_sets:
        more = Corpus(data_set_folder(run, own)) if read_only else data_set(recipe, run, task, own, corpus)
        asked = scoring_for(recipe, len(more), precision)
        found[own] = DataSet(own, f"the data set {own}", task, more, np.arange(len(more)), asked)
    sample = train_sample(recipe, run, name, len(corpus))
    if sample is not None:
        unwritten = replace(scoring, generate=0, samples=0)
        found["train"] = DataSet("train", "training examples", task, *sample, unwritten)
    return {name: grouped(recipe, each) for name, each in found.items()}


def _predictions(data: Mapping[str, DataSet], models: Sequence[ScoredModel]) -> dict[str, dict[str, Predictions]]:
    """What each model says of each data set, one model in memory at a time; of training examples only the first."""
    found: dict[str, dict[str, Predictions]] = {name: {} for name in data}
    for model, each in _work(models, data):
        found[each.name][model.name] = model.predictions(each)
    return found


def _work(models: Sequence[ScoredModel], data: Mapping[str, DataSet]) -> Iterator[tuple[ScoredModel, DataSet]]:
    """Which model is to be scored on what, one model in memory at a time; on training examples only the first."""
    for model in models:
        yield from ((model, each) for name, each in data.items() if name != "train" or model is models[0])
        model.release()


def _refuse_unfit(recipe: Recipe, run: Run) -> None:
    uris = {name: uri for name, uri in others(recipe).items() if name != "parent"}
    given = None if upstream_models(recipe, "evaluate") else recipe.model
    corpus = corpus_in(run, _corpus_name(run)) if uris or given else None
    if corpus is not None:
        task = _task(recipe, run, corpus)
        if given:
            refuse_no_text(task, given, locate(given), "the model", "model")
        for uri in uris.values():
            refuse_other_kinds(task, uri, locate(uri))


def _task(recipe: Recipe, run: Run, corpus: Corpus) -> Task:
    return task_for(recipe, run, corpus, "text" if _corpus_name(run) == "pretrain-eval" else None)


def _models(recipe: Recipe, run: Run) -> list[ScoredModel]:
    """The model first, then what it is held against."""
    folders = {"model": model_before(recipe, run, "evaluate")}
    for name, uri in others(recipe).items():
        folders[name] = locate(uri)

    def known(name: str) -> Any:
        return lambda model, data, scoring: _known(recipe, run, data, model, scoring, name)

    return [
        ScoredModel(run, name, folder, weights_digest(folder), recipe.seed, recipe.evaluate.cache, known(name))
        for name, folder in folders.items()
    ]


def _known(recipe: Recipe, run: Run, data: DataSet, model: Any, scoring: Scoring, name: str) -> Known | None:
    """What leaves the frozen blocks for each example, where that is kept already or both models have the same."""
    if recipe.freeze is None or recipe.freeze.cache is False or data.name not in (HELD_OUT, "general"):
        return None
    ours = load_config(model_before(recipe, run, "evaluate"))
    depth = depth_for_good(recipe, run, build_on_meta(ours, data.task.auto_class))
    if not depth:
        return None
    keys = recipe.freeze.model_copy(update={"cache_precision": "auto"})  # training may take rounded states, scores not
    cache = PrefixCache(keys, run, scoring.objective, model, data.task.size_column, scoring.precision, Alone())
    alike = "parent" in recipe.evaluate.models and upstream_models(recipe, "evaluate") == ("finetune",)
    what = f"the held-out data for the {name}" + (" on general text" if data.name == "general" else "")
    return known_to_score(cache, data.corpus, depth, 2 if alike else 1, what)


def _corpora(run: Run) -> dict[str, str]:
    found: dict[str, str] = run.stage("preprocess")["facts"]["corpora"]
    return found


def _corpus_name(run: Run) -> str:
    """`eval`, or the held-out part of the pretraining text when the recipe has no other data."""
    return "eval" if "eval" in _corpora(run) else "pretrain-eval"
