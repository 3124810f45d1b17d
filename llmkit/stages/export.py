"""export: the model for use elsewhere, loaded back and compared before it is called done."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np

from llmkit import catalog
from llmkit.files import digest_json
from llmkit.model.folder import weights_digest
from llmkit.model.loading import load_config
from llmkit.model.location import locate
from llmkit.model.objective import Batch
from llmkit.recipe.schema import Recipe, result_keys
from llmkit.run.directory import Artifact, Run
from llmkit.stages.base import (
    corpus_in,
    model_before,
    model_content,
    relative_files,
    task_class,
    task_for,
    upstream_models,
)


class Export:
    """Writes each format of the recipe into a folder of its own."""

    name = "export"
    version = 1
    trains = False
    resumes = False
    distributed = False
    shares = False

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """The model."""
        return tuple(reversed(upstream_models(recipe, self.name)))

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """The model's weights and the keys of `export`."""
        return {f"recipe.export.{key}": value for key, value in result_keys(recipe.export).items()} | {
            "model": model_content(recipe, run, self.name),
            "dtype": _dtype(recipe, run)[0],
        }

    def run(self, recipe: Recipe, run: Run) -> Artifact:
        """Leaves `FORMAT/` for each format. Raises ArtifactError when what was written does not answer as the model does."""
        source = model_before(recipe, run, self.name)
        folder = run.folder(self.name)
        facts: dict[str, Any] = {}
        dtype, why = _dtype(recipe, run)
        if why:
            run.guess("export.dtype", dtype, why)
        for name in recipe.export.formats:
            aside = folder / f".{name}.tmp"
            shutil.rmtree(aside, ignore_errors=True)
            write = catalog.resolve("export format", name)
            facts[name] = write(source, aside, task_class(recipe).auto_class, dtype, _probe(recipe, run))
            shutil.rmtree(folder / name, ignore_errors=True)
            aside.rename(folder / name)
            compared = facts[name]
            run.reporter.note(
                f"export/{name} was loaded back: {compared['compared_logits']:,} logits, largest difference "
                f"{compared['largest_difference']:g}"
            )
        content = digest_json({name: weights_digest(folder / name) for name in recipe.export.formats})
        metrics = {f"{name}.{key}": value for name, found in facts.items() for key, value in found.items()}
        first = folder / recipe.export.formats[0]
        return Artifact(self.name, first, content, relative_files(run, folder), metrics, facts)


STAGE = Export()


def _dtype(recipe: Recipe, run: Run) -> tuple[str, str | None]:
    """The type of the exported weights, and why; training keeps them in fp32 whatever the parent had."""
    if recipe.export.dtype != "auto":
        return recipe.export.dtype, None
    source = locate(recipe.model) if recipe.model is not None else model_before(recipe, run, "export")
    dtype = str(getattr(load_config(source), "dtype", None) or "float32").removeprefix("torch.")
    return dtype, "as the parent has it" if recipe.model is not None else "as it was trained"


def _probe(recipe: Recipe, run: Run) -> Batch | None:
    """A few held-out examples to compare models on; None when the run has no data, and the format makes its own."""
    for name in ("eval", "train", "pretrain"):
        corpus = corpus_in(run, name)
        if corpus is not None and len(corpus):
            task = task_for(recipe, run, corpus, "text" if name == "pretrain" else None)
            chosen = np.unique(np.linspace(0, len(corpus) - 1, 4).astype(int))
            return task.padded([corpus[int(i)] for i in chosen])
    return None
