"""What a training leaves: the model as a Transformers folder, what was measured, and how its parameters were grouped."""

from __future__ import annotations

import shutil
from typing import Any

from llmkit import __version__
from llmkit.files import sync_folder, sync_tree, write_json
from llmkit.model.adapters import merged, save_adapter
from llmkit.stages.job import TrainingJob
from llmkit.train.loop import Fit
from llmkit.train.memory import peak_memory_bytes
from llmkit.train.state import TrainState


def save_model(job: TrainingJob, model: Any) -> None:
    """Writes the model aside and renames it into place; then forgets what only served to resume."""
    folder = job.run.folder(job.stage)
    aside, target = folder / ".model.tmp", folder / "model"
    shutil.rmtree(aside, ignore_errors=True)
    model.config.use_cache = True
    if job.adapter is None:
        model.save_pretrained(aside)
    else:
        with merged(model) as weights:
            model.save_pretrained(aside, state_dict=weights)
        pretrained = "pretrain" in job.recipe.plan or job.recipe.model is None
        save_adapter(model, folder / "adapter", model.config._name_or_path if pretrained else str(job.recipe.model))
    job.task.tokenizer.save_pretrained(aside)
    write_json(
        aside / "llmkit.json",
        {
            "llmkit": __version__,
            "recipe": job.recipe.name,
            "stage": job.stage,
            "task": job.recipe.task,
            "peak_lr": job.lr,
        },
    )
    sync_tree(aside)  # before the checkpoints, which it takes the place of, are deleted
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)
    sync_folder(folder)


def training_metrics(state: TrainState, fit: Fit) -> dict[str, Any]:
    """What a script wants to know of a training."""
    return {
        "steps": state.step,
        "train_loss": state.train_loss,
        "eval_loss": state.best_loss if fit.training.keep == "best" else state.eval_loss,
        "train_seconds": round(state.seconds, 3),
        "save_seconds": round(state.save_seconds, 3),
        "train_tokens": state.tokens,
        "supervised_tokens": state.supervised,
        "tokens_per_second": round(state.tokens_per_second, 1),
        "computed_tokens": state.computed,
        "padding_share": round(max(0.0, 1 - state.tokens / state.computed), 4) if state.computed else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "best_step": state.best_step,
        "refused_steps": state.refused_steps,
    }


def group_rows(groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Name, tensors, parameters, peak rate and weight decay of each group."""
    return [
        (g["group"], len(g["names"]), sum(p.numel() for p in g["params"]), g["lr"], g["weight_decay"]) for g in groups
    ]
