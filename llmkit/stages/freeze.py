"""freeze: which parameters will stand still, decided on the meta device and written down as data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llmkit.errors import RecipeError
from llmkit.files import digest_json, write_json
from llmkit.model.loading import build_on_meta, dropout_rates, load_config
from llmkit.recipe.schema import Recipe, result_keys
from llmkit.run.directory import Artifact, Run
from llmkit.stages.base import freeze_plan, model_before, model_content, require_corpus, task_class, task_for
from llmkit.stages.sweep import Sweep, chosen_plan, sweep, sweep_rows
from llmkit.train.allocator import give_back_freed_memory

_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


class Freeze:
    """Resolves the recipe's rules against the model's anatomy. Nothing is loaded but the config."""

    name = "freeze"
    version = 1
    trains = False
    resumes = True
    distributed = False
    shares = False

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """The model that is to be frozen, and the data where they decide its shape (the number of labels)."""
        tries = recipe.freeze is not None and recipe.freeze.by_evidence
        data = ("preprocess",) if tries or task_class(recipe).shaped_by_data else ()
        return (*data, *(("pretrain",) if "pretrain" in recipe.plan else ()))

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """The rules, and the model's config."""
        config = load_config(model_before(recipe, run, "finetune")).to_dict()
        found: dict[str, Any] = {f"recipe.freeze.{key}": value for key, value in result_keys(recipe.freeze).items()}
        found["model config"] = digest_json({k: v for k, v in config.items() if k not in _VOLATILE})
        found["recipe.task"] = recipe.task
        if recipe.freeze is not None and recipe.freeze.by_evidence:  # then it depends on all that a training does
            fine_tuning = result_keys(recipe.finetune).items()
            found |= {f"recipe.finetune.{key}": value for key, value in fine_tuning} | {"recipe.seed": recipe.seed}
            found |= {"corpora": run.stage("preprocess")["facts"]["corpora"]}
            found |= {"parent": model_content(recipe, run, "finetune")}
        return found

    def run(self, recipe: Recipe, run: Run) -> Artifact:
        """Writes `freeze.json`. Raises RecipeError for a rule that matches nothing, and for freezing everything."""
        if recipe.freeze is None:
            raise RecipeError("there is nothing to freeze", expected="a section `freeze` in the recipe", where="freeze")
        config = load_config(model_before(recipe, run, "finetune"))
        task = task_class(recipe)
        if task.shaped_by_data:
            corpus = require_corpus(run, "train", "data.train")
            config.update(task_for(recipe, run, corpus).model_changes(config))
        model = build_on_meta(config, task.auto_class)
        found = _swept(recipe, run) if recipe.freeze.by_evidence else None
        plan = freeze_plan(recipe, model) if found is None else chosen_plan(found, model)
        folder = run.folder(self.name)
        write_json(folder / "freeze.json", plan.to_json())
        total = plan.frozen_count + plan.trainable_count
        rows: list[tuple[Any, ...]] = [(rule, what) for rule, what in plan.reasons.items()]
        rows.append(("stands still", f"{plan.frozen_count:,} parameters ({plan.frozen_count / total:.1%})"))
        rows.append(("is trained", f"{plan.trainable_count:,} parameters ({plan.trainable_count / total:.1%})"))
        if not isinstance(recipe.freeze.unfreeze, str):
            rows += [(thaw["what"], f"moves from {_when(thaw['at'])} on") for thaw in plan.thaws]
        run.reporter.table("freeze plan", ("rule", "what it takes"), rows)
        for note in plan.notes:
            run.reporter.note(note)
        if plan.frozen and not recipe.freeze.dropout and any(dropout_rates(config).values()):
            run.reporter.note("what stands still computes without dropout (freeze.dropout: true leaves it in)")
        metrics: dict[str, Any] = {
            "frozen_parameters": plan.frozen_count,
            "trainable_parameters": plan.trainable_count,
        }
        if found is not None:
            metrics |= {"recommended": found.recommended.name, "reason": found.reason}
        facts = {} if found is None else asdict(found)
        content = digest_json(
            [plan.frozen, plan.trainable, plan.thaws, recipe.freeze.dropout, recipe.freeze.cache_precision]
        )
        return Artifact(self.name, folder / "freeze.json", content, (f"{self.name}/freeze.json",), metrics, facts)


STAGE = Freeze()


def _swept(recipe: Recipe, run: Run) -> Sweep:
    """Tries depths, and shows what came of it."""
    found = sweep(recipe, run)
    give_back_freed_memory()  # on a GPU, to the processes that train next
    columns = ("", "trained", "parameters", "seconds", "held-out loss", "accuracy")
    run.reporter.table("sweep", columns, sweep_rows(found))
    if found.left_out:
        run.reporter.warn(f"not tried, for the budget: {', '.join(found.left_out)}")
    run.guess("freeze.blocks", found.recommended.name + " trained", found.reason)
    return found


def _when(at: str | int) -> str:
    return f"step {at}" if isinstance(at, int) else f"{at} of the steps"
