"""How the processes of a training share its work: each with the whole model, or each with its rows of all parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from llmkit.errors import RecipeError
from llmkit.model.adapters import in_four_bits
from llmkit.stages.job import TrainingJob
from llmkit.stages.sizing import Sizing, available_bytes
from llmkit.train.sharding import ELEMENTWISE


def share_of_memory(device: torch.device) -> int:
    """The bytes that this process may fill; those of one machine's CPU share its memory."""
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return available_bytes(device) // neighbours


def choose_parallel(
    job: TrainingJob, accelerator: Any, precision: str, available: int, size: Callable[[int], Sizing]
) -> tuple[Sizing, bool]:
    """The sizing of a training, and whether it spreads its parameters over the processes; says why.

    `size` gives the sizing with parameters spread over so many. Raises RecipeError when the recipe asks for what cannot be.
    """
    wanted, processes, guess = job.recipe.parallel, accelerator.num_processes, job.run.guess
    if processes == 1:
        asked = {"parallel": wanted == "fsdp", "local": job.training.local is not None}
        for key in (key for key, is_asked in asked.items() if is_asked):
            guess(f"{job.stage}.{key}", "none", "there is one process, and nobody to share with")
        return size(1), False
    against = _why_not_spread(job, precision)
    if wanted == "fsdp" and against is not None:
        raise RecipeError(f"parallel: fsdp does not go with {against[0]}", hint=against[1], where="parallel")
    whole = size(1) if wanted != "fsdp" else None
    if whole is not None and (wanted == "ddp" or whole.memory.total <= available):
        if wanted == "auto":
            guess(f"{job.stage}.parallel", "ddp", f"each of the {processes} processes has room for the whole model")
        return whole, False
    if whole is not None and against is not None:
        guess(f"{job.stage}.parallel", "ddp", f"fsdp does not go with {against[0]}")
        return whole, False
    spread = size(processes)
    if whole is not None:
        gib, need = available / 2**30, whole.memory.total / 2**30
        why = f"the whole model takes {need:,.1f} GiB a process, and there are {gib:,.1f}; spread, it takes "
        guess(f"{job.stage}.parallel", "fsdp", f"{why}{spread.memory.total / 2**30:,.1f}")
    return spread, True


def _why_not_spread(job: TrainingJob, precision: str) -> tuple[str, str] | None:
    """What of a training needs whole parameters, and what to do about it; None for nothing."""
    if job.training.local is not None:
        return f"{job.stage}.local", "take one of the two"
    if job.training.optimizer.name not in ELEMENTWISE:
        return f"optimizer: {job.training.optimizer.name}", f"take one of {', '.join(sorted(ELEMENTWISE))}"
    if job.thaws:
        return "freeze.unfreeze", "leave it out, or set parallel: ddp"
    if precision == "fp16":
        return "precision: fp16", "set precision: bf16"
    if job.adapter is not None and in_four_bits(job.adapter):
        return "adapters beside weights in 4 bits", "set parallel: ddp"
    return None
