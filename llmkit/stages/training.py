"""What pretraining and fine-tuning share: from a model and a corpus to a trained model in the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from llmkit.data.corpus import Example
from llmkit.data.states import STATES
from llmkit.errors import RecipeError, did_you_mean
from llmkit.model.adapters import in_four_bits
from llmkit.model.context import Context
from llmkit.model.folder import weights_digest
from llmkit.model.groups import RateRule, Rates, parameter_groups
from llmkit.model.objective import Objective
from llmkit.model.sending import send_from_first
from llmkit.optim import build_optimizer, build_schedule
from llmkit.recipe.training import Training
from llmkit.recipe.values import seconds_of
from llmkit.run.directory import Artifact
from llmkit.run.log import MetricsLog
from llmkit.stages.base import parts_of, precision_for, relative_files, within
from llmkit.stages.job import TrainingJob
from llmkit.stages.parallel import choose_parallel, named, neighbours, share_of_memory, shared_rows
from llmkit.stages.prefix import known_prefix
from llmkit.stages.prefix_cache import PrefixCache
from llmkit.stages.sizing import Outline, Sizing, available_bytes, shape_computation, size_up
from llmkit.stages.streaming import streamed_examples
from llmkit.stages.tracking import config_of, tracking_of
from llmkit.stages.trained import group_rows, save_model, training_metrics
from llmkit.tasks.base import Regularisation
from llmkit.train.allocator import give_back_freed_memory, keep_freed_memory
from llmkit.train.hooks import Hook
from llmkit.train.hooks.heartbeat import HeartbeatHook
from llmkit.train.hooks.metrics_log import MetricsLogHook
from llmkit.train.hooks.progress import ProgressHook
from llmkit.train.hooks.trackers import TrackersHook
from llmkit.train.loop import Fit
from llmkit.train.masters import Masters
from llmkit.train.mesh import Mesh
from llmkit.train.sharding import ShardedMasters
from llmkit.train.spread import SpreadMasters
from llmkit.train.state import TrainState, seed_everything
from llmkit.train.thaw import Thaw, groups_by_thaw, thaws_at
from llmkit.train.when import logged_steps
from llmkit.train.zero import Zero, ZeroMasters


def train_and_save(job: TrainingJob) -> tuple[Artifact, Fit]:
    """Trains, and leaves `model/`, a Transformers folder with `llmkit.json` beside the weights."""
    run, folder = job.run, job.run.folder(job.stage)
    accelerator = accelerator_for(job.training, job.stage)
    fit = make_fit(job, accelerator)
    if fit.resume():
        run.reporter.stage(job.stage, "resumed", f"going on after step {fit.state.step} of {fit.total_steps}")
    run.note(job.stage, total_steps=fit.total_steps)
    state = fit.run(_hooks(job, fit, accelerator))
    fit.release()
    give_back_freed_memory()
    if accelerator.is_main_process or fit.masters.sharded:
        with fit.masters.in_full() as model:
            if accelerator.is_main_process:
                save_model(job, model)
    accelerator.wait_for_everyone()
    model_folder = folder / "model"
    artifact = Artifact(
        job.stage,
        model_folder,
        weights_digest(model_folder),
        relative_files(run, model_folder) + (relative_files(run, folder / "adapter") if job.adapter else ()),
        training_metrics(state, fit),
        {
            "precision": fit.precision,
            "learning_rate": job.lr,
            "parameter_groups": list(fit.group_rows),
            "processes": accelerator.num_processes,
            "parallel": named(
                fit.masters.mesh if isinstance(fit.masters, SpreadMasters) else None, accelerator.num_processes
            ),
            "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type,
        },
        fit.keeper.disposable(state),
    )
    return artifact, fit


def make_fit(job: TrainingJob, accelerator: Any) -> Fit:
    """Everything that a training needs, ready for its first step."""
    run, training, device = job.run, job.training, accelerator.device
    precision = precision_for(run, job.stage, training.precision, device)
    sizing, mesh = _sizing(job, precision, accelerator)
    if device.type == "cpu":
        keep_freed_memory(sizing.memory.total)
    else:
        torch.cuda.reset_peak_memory_stats()
    model = job.model
    model.config.use_cache = False
    seed_everything(job.recipe.seed + (mesh.place if mesh else accelerator.process_index))
    thaws = thaws_at(job.thaws, sizing.steps)
    with within(job.stage):
        groups = parameter_groups(model, rates_of(training, job.lr), weight_decay=training.weight_decay)
    groups = groups_by_thaw(groups, thaws)
    columns = ("group", "tensors", "parameters", "peak rate", "weight decay")
    rows = group_rows(groups)
    run.reporter.table("parameter groups", columns, rows)
    groups = [group | {"params": []} for group in groups]  # which so do not outlive their spreading
    masters, objective = _masters(job, precision, mesh, accelerator)
    if objective.why_padded:
        run.guess(f"{job.stage}: padded batches", True, f"examples cannot be packed: {objective.why_padded}")
    objective, train, held_out = _data(job, objective, precision, sizing, thaws, accelerator, sharded=masters.sharded)
    shape_computation(model, training)
    options = training.optimizer.options
    return Fit(
        accelerator=accelerator,
        masters=masters,
        objective=objective,
        optimizer=build_optimizer(training.optimizer.name, masters.adopt(groups), lr=job.lr, options=options),
        schedule=build_schedule(training.schedule.name, training.schedule.options),
        training=training,
        train=train,
        held_out=held_out,
        size_column=job.task.size_column,
        seed=job.recipe.seed,
        precision=precision,
        folder=run.folder(job.stage),
        fingerprint=run.stage(job.stage).get("fingerprint", ""),
        warn=run.reporter.warn,
        frozen_dropout=job.freezes is None or job.freezes.dropout,
        thaws=thaws,
        note=run.reporter.note,
        describe=partial(_described, job.task.tokenizer),
        deadline=run.deadline,
        save_last=True,
        group_rows=tuple(rows),
        writers=masters.writers(timedelta(seconds=seconds_of(job.recipe.launch.hang_after))),
        save_behind=_has_room_for_copy(masters, training, sizing, device),
        accepted=run.stage(job.stage).get("accepts", ()),
        state=TrainState(micro_batch_tokens=sizing.micro_batch_tokens),
    )


def _masters(job: TrainingJob, precision: str, mesh: Mesh | None, accelerator: Any) -> tuple[Masters, Objective]:
    """The model where it is to be trained, and what it is trained on, found out by trying the model itself.

    The first process has the weights, and sends them to the others, but for those of 4 bits, which each has.
    """
    from accelerate.utils import broadcast_object_list

    model, device, regularisation = job.model, accelerator.device, regularisation_of(job.training)
    alone = accelerator.num_processes == 1 or (job.adapter is not None and in_four_bits(job.adapter))
    masters: Masters
    if isinstance(mesh, Zero):
        masters = ZeroMasters(model, precision, mesh, device)
        objective = job.task.objective(model, regularisation)
    elif mesh is not None:
        masters = ShardedMasters(model, precision, mesh, device)
        objective = masters.call(job.task.objective, regularisation)
        if mesh.context > 1:
            objective = shared_rows(objective, masters.context())
    else:
        model.to(device) if alone else send_from_first(model, device)
        objective = job.task.objective(model, regularisation)  # before its numbers are those that it computes with
        masters = Masters(model, precision)
    if job.l2_sp:
        new = job.new_parameters if alone else broadcast_object_list([job.new_parameters])[0]
        masters.anchor((name for name in masters.weights if name not in new), job.l2_sp)
    return masters, objective


def _data(
    job: TrainingJob,
    objective: Objective,
    precision: str,
    sizing: Sizing,
    thaws: Sequence[Thaw],
    accelerator: Any,
    *,
    sharded: bool,
) -> tuple[Objective, Any, Any]:
    """The objective and the data: a stream, or corpora with what leaves the frozen blocks where that is kept."""
    if job.recipe.data.stream and job.train.folder.name == "train":
        streamed = streamed_examples(job, accelerator.process_index, padded=objective.padded)
        return objective, streamed, job.held_out
    if job.freezes is None or sharded:
        return objective, job.train, job.held_out
    cache = PrefixCache(job.freezes, job.run, objective, job.model, job.task.size_column, precision, accelerator)
    return known_prefix(cache, job.training, sizing.order, sizing.steps, thaws, (job.train, job.held_out))


def _described(tokenizer: Any, example: Example) -> dict[str, Any]:
    """An example for people: its text, and its columns as they are."""
    columns = {name: value.tolist() if hasattr(value, "tolist") else value for name, value in example.items()}
    columns.pop(STATES, None)
    return {"text": tokenizer.decode(example["input_ids"])} | columns


def _has_room_for_copy(masters: Masters, training: Training, sizing: Sizing, device: torch.device) -> bool:
    """True when the machine holds a copy of what a checkpoint saves beside all that training takes."""
    states = 3 if training.ema is None else 4  # the weights, two moments of each, and the average
    copy = states * sum(tensor.nbytes for tensor in masters.outlines().values())
    taken = sizing.memory.total if device.type == "cpu" else sizing.memory.offloaded * neighbours()
    return taken + copy < available_bytes(torch.device("cpu"))


def rates_of(training: Training, lr: float) -> Rates:
    """The peak rates that a recipe asks for, with `lr` as that of all it says nothing of."""
    rules = [RateRule(parts_of(rule), rule.lr, rule.lr_scale or 1.0) for rule in training.rates]
    return Rates(lr, training.layer_decay or 1.0, rules)


def regularisation_of(training: Training) -> Regularisation:
    """What a recipe says of it."""
    return Regularisation(training.label_smoothing, training.neftune_alpha)


def _sizing(job: TrainingJob, precision: str, accelerator: Any) -> tuple[Sizing, Mesh | None]:
    """How many tokens to compute at once, and what they take, and the mesh over which parameters are spread.

    Warns when that is more than there is memory for.
    """
    from accelerate.utils import gather_object

    def whole(model: Any) -> Objective:
        return job.task.objective(model, regularisation_of(job.training))

    outline = Outline(
        config=job.model.config,
        auto_class=job.task.auto_class,
        frozen=job.frozen_before
        if job.adapter
        else frozenset(name for name, p in job.model.named_parameters() if not p.requires_grad),
        objective=whole,
        training=job.training,
        examples=job.train,
        lengths=job.train.lengths(job.task.size_column),
        seed=job.recipe.seed,
        precision=precision,
        device=accelerator.device,
        processes=accelerator.num_processes,
        adapter=job.adapter,
    )
    # Of the process that has least: all have to choose the same, and to cut the held-out data alike.
    available = min(gather_object([share_of_memory(accelerator.device)]))

    def size(mesh: Mesh | None) -> Sizing:
        if isinstance(mesh, Zero):
            return size_up(replace(outline, zero=mesh), available)
        spread = outline if mesh is None else replace(outline, shards=mesh.count, processes=mesh.shares)
        if mesh is not None and mesh.context > 1:
            spread = replace(spread, objective=lambda model: shared_rows(whole(model), Context(0, mesh.context)))
        return size_up(spread, available)

    sizing, mesh = choose_parallel(job, accelerator, precision, available, size)
    job.run.reporter.note(
        f"{job.stage}: {sizing.largest:,} tokens at once at most; {sizing.memory.total / 2**30:.1f} GiB foreseen beside "
        f"the program itself, of {available / 2**30:.1f} GiB"
    )
    away, room = sizing.memory.offloaded, share_of_memory(torch.device("cpu"))
    if away > room:
        job.run.reporter.warn(
            f"{job.stage} may fill the machine's memory: {away / 2**30:.1f} GiB a process are offloaded, and there are "
            f"{room / 2**30:.1f}"
        )
    if sizing.memory.total > available:
        job.run.reporter.warn(
            f"{job.stage} may run out of memory: lower data.max_length, set {job.stage}.activation_checkpointing: true, "
            "or freeze more (`llmkit plan` shows what takes how much)"
        )
    return sizing, mesh


def accelerator_for(training: Training, stage: str) -> Any:
    """An Accelerator, which knows of processes and devices; precision is the stepper's. Checks the trackers' names."""
    from accelerate import Accelerator
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType if kind.value in LOGGER_TYPE_TO_CLASS]
    for name in training.trackers:
        if name not in known:
            raise RecipeError(
                f"unknown tracker `{name}`",
                got=name,
                expected="one of " + ", ".join(known),
                hint=did_you_mean(name, known),
                where=f"{stage}.trackers",
            )
    cpu = not torch.cuda.is_available()  # said, because else Accelerate takes several CPU processes for one
    return Accelerator(
        cpu=cpu,
        mixed_precision="no",  # said, because else a launcher's environment would decide
    )


def _hooks(job: TrainingJob, fit: Fit, accelerator: Any) -> list[Hook]:
    """Logs, progress and trackers; in the first process only; signs of life in each of several."""
    hooks: list[Hook] = []
    if accelerator.num_processes > 1:
        hooks.append(HeartbeatHook(job.run.folder(job.stage) / f".beat-{accelerator.process_index}"))
    if accelerator.is_main_process:
        log = MetricsLog(
            job.run.path / "metrics.jsonl", job.stage, step=fit.state.step, refused=fit.state.refused_steps
        )
        is_logged = logged_steps(job.training.log_every, fit.total_steps)
        hooks.append(MetricsLogHook(log, is_logged))
        progress = job.run.reporter.progress(job.stage, fit.total_steps, "steps")
        progress.advance(fit.state.step)
        hooks.append(ProgressHook(progress, fit.state.step))
        opened = tracking_of(job.recipe, job.run, job.stage).open(config_of(job.recipe), step=fit.state.step)
        hooks.append(TrackersHook(opened, is_logged, job.run.reporter.warn))
    return hooks
