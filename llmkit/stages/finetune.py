"""finetune: learning the task with a lowered rate, while what is frozen stays bit-identical."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmkit.errors import RecipeError
from llmkit.files import digest_files, read_json
from llmkit.model.adapter_targets import not_adapted
from llmkit.model.adapters import add_adapters, in_four_bits, misread_by_peft
from llmkit.model.freezing import FreezePlan, apply_freeze
from llmkit.model.loading import dropout_changes, load_config, load_model
from llmkit.model.parts import some_of
from llmkit.model.precision import compute_in
from llmkit.model.quantized import what_is_quantized
from llmkit.recipe.schema import Recipe, result_keys
from llmkit.run.directory import Artifact, Run
from llmkit.stages.base import (
    adapter_rules,
    corpus_in,
    model_before,
    model_content,
    require_corpus,
    task_for,
    training_record,
    weights_or_outline,
    within,
)
from llmkit.stages.evaluate import scoring_for
from llmkit.stages.job import TrainingJob
from llmkit.stages.training import train_and_save
from llmkit.tasks.scoring import evaluate
from llmkit.train.allocator import give_back_freed_memory
from llmkit.train.loop import Fit
from llmkit.train.state import seed_everything
from llmkit.train.step import is_out_of_memory

# Peak rates for a parent that does not record its own. Text and chat: the rate at which Ouyang et al. (InstructGPT,
# 2022) and most recipes since tune whole models; classify: from the range of Devlin et al. (BERT, 2019).
_DEFAULT_LR = {"text": 2e-5, "chat": 2e-5, "classify": 5e-5, "regress": 5e-5}
_ADAPTER_LR = 2e-4  # Dettmers et al. (QLoRA, 2023)


class Finetune:
    """Trains on the corpus `train`, starting from the pretrained or the recipe's model."""

    name = "finetune"
    version = 1
    trains = True
    resumes = True
    distributed = True
    shares = False

    def needs(self, recipe: Recipe) -> tuple[str, ...]:
        """The corpus, and the stages of the recipe before this one."""
        return ("preprocess", *(stage for stage in ("pretrain", "freeze") if stage in recipe.plan))

    def inputs(self, recipe: Recipe, run: Run) -> dict[str, Any]:
        """The corpora, the parent's weights, the freeze plan and the keys of `finetune` that change what is learnt."""
        corpora = run.stage("preprocess")["facts"]["corpora"]
        found: dict[str, Any] = {f"recipe.finetune.{key}": value for key, value in result_keys(recipe.finetune).items()}
        found |= {
            "recipe.seed": recipe.seed,
            "recipe.task": recipe.task,
            "corpus": corpora.get("train"),
            "held out": corpora.get("eval"),
            "parent": model_content(recipe, run, self.name),
            "parent's peak rate": training_record(model_before(recipe, run, self.name)).get("peak_lr"),
        }
        if recipe.finetune.adapter is not None:
            rules = adapter_rules(recipe.finetune.adapter)
            if rules.start is not None:
                found["adapter to start from"] = digest_files(sorted(rules.start.glob("adapter_*")))
            if in_four_bits(rules):  # which are made anew from the parent when a training goes on
                found["bitsandbytes"] = _version("bitsandbytes")
        if "freeze" in recipe.plan:
            found["freeze plan"] = run.stage("freeze")["content"]
        return found

    def run(self, recipe: Recipe, run: Run) -> Artifact:
        """Leaves `model/`; scores it on the held-out data with the task's metrics, without written answers."""
        job = self.job(recipe, run, model_before(recipe, run, self.name))
        if "freeze" in recipe.plan:
            plan = FreezePlan.from_json(read_json(run.folder("freeze") / "freeze.json"))
            apply_freeze(job.model, plan)
            job = replace(job, thaws=plan.thaws)
        job = with_adapters(job)
        artifact, fit = train_and_save(job)
        return replace(artifact, metrics=artifact.metrics | _scores(job, artifact.folder, fit))

    def job(self, recipe: Recipe, run: Run, parent: Path) -> TrainingJob:
        """The training of a parent's weights on this run's corpus, nothing of it frozen yet."""
        corpus = require_corpus(run, "train", "data.train")
        task = task_for(recipe, run, corpus)
        seed_everything(recipe.seed)
        config = load_config(parent)
        changes = task.model_changes(config) | dropout_changes(config, recipe.finetune.dropout)
        loaded = weights_or_outline(parent, task.auto_class, changes, recipe.finetune.adapter)
        if loaded.new_parameters:
            run.reporter.note(f"new and untrained, seeded with {recipe.seed}: {', '.join(loaded.new_parameters)}")
        if loaded.unused_parameters:
            run.reporter.note(f"in the parent, but not used: {', '.join(loaded.unused_parameters)}")
        lr = _learning_rate(recipe, run, parent)
        held_out, freezes = corpus_in(run, "eval"), recipe.freeze if "freeze" in recipe.plan else None
        given = (recipe, run, recipe.finetune, lr, loaded.model, task, corpus, held_out, freezes)
        return TrainingJob(self.name, *given, l2_sp=recipe.finetune.l2_sp, new_parameters=loaded.new_parameters)


STAGE = Finetune()


def _scores(job: TrainingJob, folder: Path, fit: Fit) -> dict[str, Any]:
    """The task's metrics on the held-out data, in the first process; each scores its share where each has the whole model."""
    from accelerate.utils import gather_object

    held_out, accelerator = job.held_out, fit.accelerator
    if held_out is None or not len(held_out) or (fit.masters.sharded and not accelerator.is_main_process):
        return {}
    scoring = replace(scoring_for(job.recipe, len(held_out), fit.precision), generate=0, samples=0)
    if not fit.masters.sharded:
        place = (accelerator.process_index, accelerator.num_processes)
        return dict(evaluate(job.task, fit.model.eval(), held_out, scoring, place, gather_object).metrics)
    try:
        return dict(evaluate(job.task, _read_again(job, folder, fit).eval(), held_out, scoring).metrics)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        job.run.reporter.warn(
            "finetune: one process alone has no room for the model that was left, which is not scored"
        )
        return {}


def _read_again(job: TrainingJob, folder: Path, fit: Fit) -> Any:
    """The model that was left, as it computes; its processes hold but rows of it."""
    model = load_model(folder, job.task.auto_class).model
    compute_in(model, fit.precision)  # before it comes to a device that may have no room for the fp32 ones
    return model.to(fit.accelerator.device)


def with_adapters(job: TrainingJob) -> TrainingJob:
    """The job with adapters in its model, where the recipe asks for them; what is frozen is known by now."""
    keys = job.recipe.finetune.adapter
    if keys is None:
        return job
    if job.thaws:
        raise RecipeError(
            "adapters stand in for what stands still, which cannot thaw beside them",
            hint="leave out `freeze.unfreeze` or `finetune.adapter`",
            where="freeze.unfreeze",
        )
    frozen = [name for name, parameter in job.model.named_parameters() if not parameter.requires_grad]
    rules, note = adapter_rules(keys), job.run.reporter.note
    seed_everything(job.recipe.seed)
    with within("finetune"):
        left = not_adapted(job.model, rules, frozen)
        targets = add_adapters(job.model, rules, frozen)
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    note(f"{keys.name} beside {len(targets)} linear layers: {trained:,} parameters learn")
    if left:
        note(
            f"no adapters beside {some_of(list(left))}, which no linear layer holds: {sum(left.values()):,} parameters of "
            "these blocks stand still, as the parent has them"
        )
    if misread_by_peft(job.model):
        note("PEFT takes layers of this family for experts: read the adapter alone with `adapter.start`, not with PEFT")
    if in_four_bits(rules) and job.model.device.type != "meta":
        give_back_freed_memory()
        held = what_is_quantized(job.model)
        note(
            f"{held.layers} linear layers are held in 4 bits (NF4): {held.bytes / 2**20:,.1f} MiB in place of "
            f"{held.numbers / 2**19:,.1f} in 16 bits; their weights are {held.error:.1%} off the parent's (RMS), in "
            "training and in the model that it leaves"
        )
    return replace(job, adapter=rules, frozen_before=frozenset(frozen))


def _version(package: str) -> str | None:
    """The version of a package that may be missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _learning_rate(recipe: Recipe, run: Run, parent: Path) -> float:
    """The recipe's rate, or the parent's own peak times lr_scale, or a default; says which."""
    keys = recipe.finetune
    if keys.lr != "auto":
        return keys.lr
    if keys.adapter is not None:
        run.guess("finetune.lr", _ADAPTER_LR, "the default for adapters, which learn ten times as fast as weights")
        return _ADAPTER_LR
    peak = training_record(parent).get("peak_lr")
    if isinstance(peak, float):
        lr = peak * keys.lr_scale
        run.guess("finetune.lr", lr, f"the parent's peak rate {peak:g} times lr_scale {keys.lr_scale:g}")
        return lr
    lr = _DEFAULT_LR[recipe.task]
    run.guess("finetune.lr", lr, f"the default for {recipe.task}: the parent records no rate of its own")
    return lr
