"""What a stage is, and what stages ask each other: which model, which tokenizer, which task."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

from llmkit import catalog
from llmkit.data.corpus import Corpus
from llmkit.errors import ArtifactError, RecipeError, raise_all
from llmkit.files import read_json
from llmkit.model.adapters import AdapterRules, in_four_bits
from llmkit.model.folder import weights_digest
from llmkit.model.freezing import FreezePlan, ThawRule, plan_freeze
from llmkit.model.loading import LoadedModel, build_on_meta, load_config, load_model, load_tokenizer
from llmkit.model.location import locate
from llmkit.model.parts import Parts
from llmkit.model.precision import choose_precision, slow_precision
from llmkit.recipe.fields import Parts as PartKeys
from llmkit.recipe.schema import Recipe
from llmkit.recipe.training import Adapter
from llmkit.run.directory import Artifact, Run
from llmkit.tasks.base import Task, TaskSettings


class Stage(Protocol):
    """One step of the pipeline. `distributed` stages run in every process, the others in the first.

    Before a stage that `shares` runs in the first, every process calls its `share(recipe, run, process, processes)`, which
    does a part of the work ahead.

    A stage that has `check(recipe, run)` is asked before a training that it comes after, and raises what it would refuse.

    What a stage that `resumes` left unfinished is there when it runs again on the same inputs.
    """

    name: str
    version: int  # raised when the same inputs come to give something else, so that old artifacts are made again
    trains: bool
    resumes: bool
    distributed: bool
    shares: bool

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """The stages whose artifacts this one reads, in order."""

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """All that decides what the stage makes, as JSON values: its part of the recipe and digests of what it reads.

        The stages it needs are done when this is called.
        """

    def run(self, recipe: Recipe, run: Run) -> Artifact:
        """Makes the artifact in `run.folder(name)`."""


def is_first_process() -> bool:
    """True in the process that decides, and has what the others are sent."""
    return int(os.environ.get("RANK", "0")) == 0


def weights_or_outline(
    folder: Path, auto_class: str, changes: dict[str, Any], adapter: Adapter | None = None
) -> LoadedModel:
    """A model with its weights in the first process; the others get theirs from it, and have their shapes until then.

    Weights that are to be held in 4 bits are loaded in each.
    """
    if is_first_process() or (adapter is not None and in_four_bits(adapter_rules(adapter))):
        return load_model(folder, auto_class, **changes)
    return LoadedModel(build_on_meta(load_config(folder, **changes), auto_class), (), ())


@contextmanager
def within(section: str) -> Iterator[None]:
    """Makes the mistakes that are found inside those of a recipe's section."""
    try:
        yield
    except RecipeError as error:
        problems = [replace(problem, where=f"{section}.{problem.where}") for problem in error.problems]
    else:
        return
    raise_all(problems)


def freeze_plan(recipe: Recipe, model: Any, run: Run | None = None) -> FreezePlan:
    """What the recipe says shall stand still of a model, which may be on the meta device. Raises RecipeError.

    With `blocks: auto` that is what the run's sweep chose, or nothing as long as there was none.
    """
    keys = recipe.freeze
    assert keys is not None, "else there is nothing to resolve"
    if keys.by_evidence:
        chosen = run.folder("freeze") / "freeze.json" if run is not None and run.is_done("freeze") else None
        return plan_freeze(model, Parts()) if chosen is None else FreezePlan.from_json(read_json(chosen))
    given = keys.unfreeze
    thaws = given if isinstance(given, str) else [ThawRule(thaw.at, parts_of(thaw)) for thaw in given]
    return plan_freeze(model, parts_of(keys), thaws)


def adapter_rules(keys: Adapter) -> AdapterRules:
    """What the recipe says of adapters. Raises ArtifactError where there is none to start from."""
    return AdapterRules(
        **keys.model_dump(exclude={"start"}), start=None if keys.start is None else _adapter(keys.start)
    )


def _adapter(uri: str) -> Path:
    """The folder of an adapter: itself, or what a run left."""
    path = Path(uri).expanduser()
    found = path / "finetune" / "adapter" if (path / "run.json").is_file() else path
    if not (found / "adapter_config.json").is_file():
        raise ArtifactError(
            "there is no adapter",
            got=uri,
            expected="a folder with adapter_config.json, or a run that trained adapters",
            where="finetune.adapter.start",
        )
    return found


def parts_of(keys: PartKeys) -> Parts:
    """The parts of a model that some keys name."""
    return Parts(**keys.model_dump(include={field.name for field in fields(Parts)}))


def task_class(recipe: Recipe) -> type[Task]:
    """The class of the recipe's task."""
    found: type[Task] = catalog.resolve("task", recipe.task)
    return found


def task_for(recipe: Recipe, run: Run, corpus: Corpus, name: str | None = None) -> Task:
    """The task that a corpus was made for, with the settings and the tokenizer that it was made with."""
    settings = dict(corpus.meta["settings"])
    settings["labels"] = tuple(settings["labels"])
    made: Task = catalog.resolve("task", name or recipe.task)(
        load_tokenizer(run.folder("preprocess") / "tokenizer"), TaskSettings(**settings)
    )
    return made


def corpus_in(run: Run, name: str) -> Corpus | None:
    """The corpus `train`, `eval`, `pretrain` or `pretrain-eval` of a run, or None when its data have none."""
    folder = run.folder("preprocess") / name
    return Corpus(folder) if (folder / "corpus.json").exists() else None


def pretraining_corpora(recipe: Recipe) -> tuple[str, str]:
    """The corpora to pretrain on and to hold out: their own, unless the recipe gives pretraining no other data or length."""
    keys = recipe.pretrain
    assert keys is not None
    shared = keys.data is None and keys.max_length in (None, recipe.data.max_length)
    return ("train", "eval") if shared else ("pretrain", "pretrain-eval")


def require_corpus(run: Run, name: str, key: str) -> Corpus:
    """A corpus that a stage cannot do without. Raises RecipeError naming the recipe key that would give it."""
    corpus = corpus_in(run, name)
    if corpus is None or not len(corpus):
        raise RecipeError(
            f"there are no examples in `{name}`",
            expected=f"data under `{key}`",
            hint=f"set {key} in the recipe",
            where=key,
        )
    return corpus


def upstream_models(recipe: Recipe, before: str) -> tuple[str, ...]:
    """The training stages of this recipe that come before a stage, nearest first."""
    training = ("finetune", "pretrain")
    order = ("pretrain", "finetune", "evaluate", "export")
    return tuple(s for s in training if s in recipe.plan and order.index(s) < order.index(before))


def model_before(recipe: Recipe, run: Run, stage: str) -> Path:
    """The Transformers folder that a stage starts from: what the last training stage left, else the recipe's model."""
    for earlier in upstream_models(recipe, stage):
        return run.folder(earlier) / "model"
    if recipe.model is None:
        raise ArtifactError(
            "there is no model yet", expected="the model of an earlier stage", hint="run `llmkit pretrain` first"
        )
    return locate(recipe.model)


def model_content(recipe: Recipe, run: Run, stage: str) -> str:
    """The digest of the weights of `model_before`."""
    for earlier in upstream_models(recipe, stage):
        return str(run.stage(earlier)["content"])
    return weights_digest(model_before(recipe, run, stage))


def precision_for(run: Run, stage: str, wanted: str, device: Any) -> str:
    """What a stage computes in: said where it was chosen, and warned of where it is slow. Raises ResourceError."""
    precision, why = choose_precision(wanted, device)
    if why:
        run.guess(f"{stage}.precision", precision, why)
    if slow := slow_precision(precision, device):
        run.reporter.warn(f"{stage}: {slow}")
    return precision


def training_record(model: Path) -> dict[str, Any]:
    """What llmkit wrote beside a model that it trained (its peak learning rate, say); empty for other models."""
    path = model / "llmkit.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    return found


def relative_files(run: Run, folder: Path) -> tuple[str, ...]:
    """All files below a folder, relative to the run."""
    return tuple(sorted(str(path.relative_to(run.path)) for path in folder.rglob("*") if path.is_file()))
