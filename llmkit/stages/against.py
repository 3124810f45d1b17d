"""What a model is held against: which models, under which names, and whether they can be scored on the same examples."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmkit.data.sources import files_of
from llmkit.errors import RecipeError
from llmkit.model.folder import VOCABULARIES, files_in
from llmkit.model.loading import load_config, load_tokenizer
from llmkit.model.location import locate
from llmkit.recipe.schema import Recipe
from llmkit.stages.base import upstream_models
from llmkit.tasks.base import Task

_CLASSIFIER = "ForSequenceClassification"
_CAUSAL = ("CausalLM", "LMHead", "ConditionalGeneration")  # in the names of classes
_TAKEN = (
    "model",
    "models",
    "examples",
    "tables",
    "samples",
    "intervals",
    "differences",
    "slices",
    "data_sets",
    "gaps",
    "untrained",
    "scored",
    "benchmarks",
    "reasons",
    "by",
    "value",
    *("example", "source", "length", "text", "prompt", "reference", "label"),  # in predictions.jsonl
)


def others(recipe: Recipe) -> dict[str, str]:
    """The URIs of the models to hold against, by their names in results.json; a parent only where something was trained.

    One URI alone is called `other`; several are called as their folders or files are.
    """
    uris = [uri for uri in recipe.evaluate.models if uri != "parent"]
    found = {}
    if "parent" in recipe.evaluate.models and upstream_models(recipe, "evaluate") and recipe.model is not None:
        found["parent"] = recipe.model
    if len(uris) == 1:
        return found | {"other": uris[0]}
    for uri in uris:
        found[_name(uri, {*found, *_TAKEN, "parent", "other"})] = uri
    return found


def require_others(recipe: Recipe, run: Path) -> None:
    """Finds the models and data sets that evaluate needs besides those of the run; what the run makes may come later.

    Raises ArtifactError for a model that is missing or damaged, and DataError for a data set.
    """
    for name, uri in others(recipe).items():
        if name != "parent" and not _is_inside(uri, run):
            locate(uri)
    for uri in recipe.evaluate.data_sets.values():
        if not _is_inside(uri, run):
            files_of(uri)


def _is_inside(uri: str, run: Path) -> bool:
    return "://" not in uri and Path(uri).expanduser().resolve().is_relative_to(run.resolve())


def _name(uri: str, taken: Iterable[str]) -> str:
    parts = [part for part in uri.removeprefix("pkg://").rstrip("/").split("/") if part]
    plain = [part for part in parts if part not in ("model", "finetune", "pretrain", "export", "transformers")]
    name = (plain or parts or ["other"])[-1].removesuffix(".gguf")
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}-{number}"
    return unique


def refuse_other_kinds(task: Task, uri: str, folder: Path) -> None:
    """Raises RecipeError for a model that has another task, other labels or another vocabulary than the examples."""
    config = load_config(folder)
    if task.shaped_by_data and any(_CLASSIFIER in name for name in config.architectures or []):
        _refuse_other_labels(task, uri, config)
    refuse_no_text(task, uri, folder, "a model to hold against", "evaluate.against")
    if not files_in(folder, VOCABULARIES):
        return
    theirs, ours = load_tokenizer(folder).get_vocab(), task.tokenizer.get_vocab()
    if theirs != ours:
        apart = len(set(theirs.items()) ^ set(ours.items()))
        raise RecipeError(
            "a model to hold against has another vocabulary, so it cannot read the same tokens",
            got=f"{uri}: {len(theirs):,} tokens, {apart:,} entries differ",
            expected=f"the {len(ours):,} tokens of the model that is scored",
            hint=f"score it by itself, `llmkit evaluate {uri} --data ...`, and see both with `llmkit compare`",
            where="evaluate.against",
        )


def refuse_no_text(task: Task, uri: str, folder: Path, what: str, where: str) -> None:
    """Raises RecipeError for a model that predicts no text where the task asks for it; other tasks' heads can be new."""
    names = " ".join(load_config(folder).architectures or [])
    if task.auto_class == "AutoModelForCausalLM" and "For" in names and not any(name in names for name in _CAUSAL):
        raise RecipeError(
            f"{what} has another task",
            got=f"{uri}: {names}",
            expected="a model that predicts text",
            where=where,
        )


def _refuse_other_labels(task: Task, uri: str, config: object) -> None:
    known = getattr(config, "id2label", None) or {}
    labels = tuple(known[number] for number in sorted(known))
    generic = all(label == f"LABEL_{number}" for number, label in enumerate(labels))
    if labels == task.settings.labels or (generic and len(labels) == len(task.settings.labels)):
        return
    raise RecipeError(
        "a model to hold against has other labels",
        got=f"{uri}: {', '.join(labels)}",
        expected=", ".join(task.settings.labels),
        hint="they must be the same, in the same order (id2label in its config.json)",
        where="evaluate.against",
    )
