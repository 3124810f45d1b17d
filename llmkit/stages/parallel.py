"""How the processes of a training share its work: each with the whole model, with its rows of all parameters, or also
with a part of each product, or of each example.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from llmkit.errors import RecipeError
from llmkit.model.adapters import in_four_bits
from llmkit.model.context import Context
from llmkit.model.objective import Objective
from llmkit.model.precision import kept_in_fp32
from llmkit.model.tensor_parallel import tensor_plan
from llmkit.recipe.schema import Parallel
from llmkit.stages.job import TrainingJob
from llmkit.stages.sizing import Sizing, available_bytes
from llmkit.tasks.causal_objective import CausalObjective
from llmkit.train.mesh import Mesh
from llmkit.train.spread import ELEMENTWISE
from llmkit.train.zero import Zero, require_deepspeed


def share_of_memory(device: torch.device) -> int:
    """The bytes that this process may fill; those of one machine's CPU share its memory."""
    processes = neighbours() if device.type == "cpu" else 1
    return available_bytes(device) // processes


def choose_parallel(
    job: TrainingJob, accelerator: Any, precision: str, available: int, size: Callable[[Mesh | None], Sizing]
) -> tuple[Sizing, Mesh | None]:
    """The sizing of a training, and the mesh over which its parameters are spread, None for nowhere; says why.

    `size` gives the sizing for a mesh. Raises RecipeError when the recipe asks for what cannot be.
    """
    wanted, processes, guess = job.recipe.parallel, accelerator.num_processes, job.run.guess
    if processes == 1:
        asked = {"parallel": wanted not in ("auto", "ddp"), "local": job.training.local is not None}
        for key in (key for key, is_asked in asked.items() if is_asked):
            guess(f"{job.stage}.{key}", "none", "there is one process, and nobody to share with")
        return size(None), None
    against = _why_not_spread(job, precision)
    if wanted not in ("auto", "ddp"):
        if against is not None:
            raise RecipeError(
                f"parallel: {_name(wanted)} does not go with {against[0]}", hint=against[1], where="parallel"
            )
        mesh = _mesh(job, wanted, accelerator)
        return size(mesh), mesh
    whole = size(None)
    if wanted == "ddp" or whole.memory.total <= available:
        if wanted == "auto":
            guess(f"{job.stage}.parallel", "ddp", f"each of the {processes} processes has room for the whole model")
        return whole, None
    if against is not None:
        guess(f"{job.stage}.parallel", "ddp", f"fsdp does not go with {against[0]}")
        return whole, None
    mesh = Mesh(accelerator.process_index, processes)
    spread = size(mesh)
    gib, need = available / 2**30, whole.memory.total / 2**30
    why = f"the whole model takes {need:,.1f} GiB a process, and there are {gib:,.1f}; spread, it takes "
    guess(f"{job.stage}.parallel", "fsdp", f"{why}{spread.memory.total / 2**30:,.1f}")
    return spread, mesh


def named(mesh: Mesh | None, processes: int) -> str | None:
    """How processes share a training, for people; None for one process."""
    if mesh is None:
        return None if processes == 1 else "ddp"
    sizes = {"tensor": mesh.tensor, "context": mesh.context, "data": mesh.shares}
    if isinstance(mesh, Zero):
        return f"DeepSpeed ZeRO-{mesh.stage}" + (", offloaded" if mesh.offload else "")
    shared = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return "fsdp" if mesh.tensor == mesh.context == 1 else " x ".join(shared)


def shared_rows(objective: Objective, context: Context) -> Objective:
    """An objective whose rows of packed examples processes share. Raises RecipeError where they cannot."""
    found = objective.shared_with(context) if isinstance(objective, CausalObjective) else None
    if found is None:
        raise RecipeError(
            "processes cannot share the tokens of examples here",
            got=objective.why_padded or "noise on embeddings, or a task that does not predict the next token",
            expected="text or chat, with a model whose examples can be packed",
            hint="set parallel: fsdp",
            where="parallel",
        )
    return found


def _mesh(job: TrainingJob, wanted: str | Parallel, accelerator: Any) -> Mesh:
    """The mesh that a recipe asks for. Raises RecipeError when the processes or the model do not go with it."""
    processes = accelerator.num_processes
    sizes = wanted if isinstance(wanted, Parallel) else _sizes_of(wanted)
    if sizes.deepspeed is not None:
        require_deepspeed()
        return Zero(accelerator.process_index, processes, stage=sizes.deepspeed, offload=sizes.offload)
    if processes % (sizes.tensor * sizes.context):
        raise RecipeError(
            "the processes cannot be shared out so",
            got=f"{processes} processes, parallel.tensor: {sizes.tensor} and parallel.context: {sizes.context}",
            expected=f"sizes whose product divides {processes}",
            where="parallel",
        )
    if sizes.tensor > 1:
        _require_cuttable(job, sizes.tensor)
    return Mesh(accelerator.process_index, processes, sizes.tensor, sizes.context)


def _require_cuttable(job: TrainingJob, parts: int) -> None:
    """Raises RecipeError when a model's products cannot be cut in so many parts."""
    if job.adapter is not None:
        why: str | None = "adapters beside its products"
    else:
        why = tensor_plan(job.model, parts).why_not
    if why is None:
        return
    fitting = [
        n for n in range(2, parts) if job.adapter is None and not parts % n and not tensor_plan(job.model, n).why_not
    ]
    smaller = f"parallel: {{tensor: {max(fitting)}}} or " if fitting else ""
    raise RecipeError(
        f"this model's products cannot be cut in {parts} parts",
        got=why,
        hint=f"set {smaller}parallel: fsdp",
        where="parallel",
    )


def _sizes_of(wanted: str) -> Parallel:
    """What a word stands for, beside the processes of this machine."""
    if wanted in ("tensor", "context"):
        return Parallel(**{wanted: neighbours()})
    return Parallel(deepspeed=2) if wanted == "deepspeed" else Parallel()


def _name(wanted: str | Parallel) -> str:
    if isinstance(wanted, str):
        return wanted
    if wanted.deepspeed is not None:
        return "deepspeed"
    return "tensor" if wanted.tensor > 1 else "context" if wanted.context > 1 else "fsdp"


def neighbours() -> int:
    """How many processes this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _why_not_spread(job: TrainingJob, precision: str) -> tuple[str, str] | None:
    """What of a training needs whole parameters, and what to do about it; None for nothing."""
    if job.training.local is not None:
        return f"{job.stage}.local", "take one of the two"
    if job.training.optimizer.name not in ELEMENTWISE:
        return f"optimizer: {job.training.optimizer.name}", f"take one of {', '.join(sorted(ELEMENTWISE))}"
    if any(rate for name, rate in job.model.config.to_dict().items() if "layerdrop" in name):
        return "layerdrop in the model's config", "set parallel: ddp: each process would leave out other blocks"
    if job.thaws:
        return "freeze.unfreeze", "leave it out, or set parallel: ddp"
    if precision == "fp16":
        return "precision: fp16", "set precision: bf16"
    if job.adapter is not None and in_four_bits(job.adapter):
        return "adapters beside weights in 4 bits", "set parallel: ddp"
    if single := [name for name, parameter in job.model.named_parameters() if not parameter.ndim]:
        return f"parameters of a single number ({single[0]})", "set parallel: ddp"
    if precision == "bf16" and (kept := sorted(kept_in_fp32(job.model))):
        return f"parameters that stay in fp32 ({kept[0]})", "set precision: fp32, or parallel: ddp"
    return None
