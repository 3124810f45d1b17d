"""What a recipe's training will take, before any of it starts: examples, steps, parameters, memory by part, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from llmkit.data.corpus import Corpus, Example
from llmkit.errors import RecipeError
from llmkit.model.adapters import in_four_bits
from llmkit.model.folder import VOCABULARIES, files_in
from llmkit.model.freezing import apply_freeze
from llmkit.model.loading import build_on_meta, dropout_changes, load_config
from llmkit.model.location import locate, locate_config
from llmkit.model.precision import choose_precision, default_device
from llmkit.model.quantized import numbers_in
from llmkit.recipe.schema import Recipe
from llmkit.recipe.training import Training
from llmkit.run.directory import Run
from llmkit.stages.base import adapter_rules, corpus_in, freeze_plan, pretraining_corpora, task_class, task_for
from llmkit.stages.finetune import STAGE as FINETUNE
from llmkit.stages.finetune import with_adapters
from llmkit.stages.job import TrainingJob
from llmkit.stages.pipeline import run_stages
from llmkit.stages.prefix import foreseen_prefix
from llmkit.stages.pretrain import STAGE as PRETRAIN
from llmkit.stages.sizing import Outline, Sizing, available_bytes, size_up
from llmkit.stages.training import accelerator_for, make_fit, regularisation_of
from llmkit.train.memory import peak_memory_bytes

# What a training reaches of the rate of a large matrix product, seen on the shipped recipes; --measure does not guess.
_EFFICIENCY = {"cpu": 0.25, "cuda": 0.4}
_LONG_ENOUGH = 0.05  # seconds that a product has to take, for its rate to be believed
_MEASURED_STEPS = 4


@dataclass(frozen=True)
class StagePlan:
    """What one stage will take. Bytes are of the fullest moment; `seconds` are of its steps, evaluations left out."""

    stage: str
    data: str  # how the numbers of examples and tokens are known
    examples: int | None
    supervised: int | None
    tokens: int
    steps: int
    padding_share: float
    trainable_parameters: int
    frozen_parameters: int
    precision: str
    micro_batch_tokens: int
    memory_bytes: dict[str, int]  # by part
    peak_memory_bytes: int
    available_bytes: int
    fits: bool
    frozen_prefix_blocks: int
    cache_bytes: int  # on disk, at most, for what leaves the frozen prefix; 0 where it is computed each time
    flops: float
    seconds: float
    seconds_from: str


class OneLength(Sequence[Example]):
    """Made-up examples in place of data that are not there: all as long as they may be, everything supervised."""

    def __init__(self, length: int) -> None:
        self._example: Example = {
            "input_ids": np.zeros(length, np.int64),
            "supervised": np.ones(length, bool),
            "label": 0,
        }

    def __getitem__(self, index: Any) -> Any:
        return self._example

    def __len__(self) -> int:
        return 1


def plan_stages(recipe: Recipe, run: Run, *, measure: bool) -> list[StagePlan]:
    """The plan of each stage that trains, or of fine-tuning when the recipe names none.

    Preprocesses the data first, where there are any, which is kept for the run itself. With `measure`, a few steps are
    taken, and nothing of them is kept. Raises RecipeError when something is to be measured without data.
    """
    import accelerate  # noqa: F401  what training imports is part of the program
    import transformers.modeling_utils  # noqa: F401

    stages = [stage for stage in ("pretrain", "finetune") if stage in recipe.plan] or ["finetune"]
    program = peak_memory_bytes() if not torch.cuda.is_available() else 0
    if has_data(recipe):
        run_stages(recipe, run, "preprocess")
    elif measure:
        raise RecipeError("there are no data to measure with", expected="`data.train`", where="data.train")
    return [_plan(recipe, run, stage, program, measure=measure) for stage in stages]


def has_data(recipe: Recipe) -> bool:
    """True when the data can be made tokens of: a config alone has no tokenizer."""
    if recipe.data.train is None and (recipe.pretrain is None or recipe.pretrain.data is None):
        return False
    return recipe.model is None or bool(files_in(locate_config(recipe.model), VOCABULARIES))


def _plan(recipe: Recipe, run: Run, stage: str, program: int, *, measure: bool) -> StagePlan:
    outline, corpus = outline_of(recipe, run, stage)
    available = available_bytes(outline.device) - program
    sizing = size_up(outline, available)
    memory = sizing.memory
    model = outline.model()
    loading = max(0, _loading_bytes(outline, model) - memory.total)
    parts = memory.parts | ({"loading": loading} if loading else {}) | ({"program": program} if program else {})
    passes = sizing.steps / sizing.order.steps_per_epoch
    known = foreseen_prefix(recipe.freeze if stage == "finetune" else None, model, outline.precision, passes)
    tokens = sum(
        int(data.lengths(task_class(recipe).size_column).sum()) for data in (corpus, corpus_in(run, "eval")) if data
    )
    flops = sizing.flops - known.flops_a_token * sizing.tokens * (1 - 1 / passes)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = StagePlan(
        stage=stage,
        data="the corpus" if corpus is not None else "no data: one epoch of one batch, as long as may be",
        examples=None if corpus is None else len(corpus),
        supervised=None
        if corpus is None or "supervised" not in corpus.columns
        else int(corpus.values("supervised").sum()),
        tokens=sizing.tokens,
        steps=sizing.steps,
        padding_share=sizing.padding_share,
        trainable_parameters=trainable,
        frozen_parameters=numbers_in(model) - trainable,
        precision=outline.precision,
        micro_batch_tokens=sizing.largest,
        memory_bytes=parts,
        peak_memory_bytes=memory.total + loading + program,
        available_bytes=available + program,
        fits=memory.total + loading <= available,
        frozen_prefix_blocks=known.blocks,
        cache_bytes=known.bytes_a_token * tokens,
        flops=flops,
        seconds=flops / (matrix_rate(outline.device, outline.precision) * _EFFICIENCY[outline.device.type]),
        seconds_from=f"a guess: {_EFFICIENCY[outline.device.type]:.0%} of this device's matrix product rate",
    )
    return _measured(recipe, run, plan, sizing) if measure else plan


def _loading_bytes(outline: Outline, model: Any) -> int:
    """What a model takes on the device before its weights are made 4 bits each; it is on the CPU then, in fp32."""
    packs = outline.adapter is not None and in_four_bits(outline.adapter)
    return 4 * numbers_in(model) if packs and outline.device.type == "cpu" else 0


def outline_of(recipe: Recipe, run: Run, stage: str) -> tuple[Outline, Corpus | None]:
    """The stage's training without its weights, and its corpus where there is one."""
    training: Training | None = getattr(recipe, stage)
    assert training is not None, "the schema asks for a section of each stage"
    name = pretraining_corpora(recipe)[0] if stage == "pretrain" else "train"
    corpus = corpus_in(run, name) if has_data(recipe) else None
    task = task_class(recipe)
    config = _config(recipe, run, stage, corpus)
    exact = str(config.dtype) == "torch.bfloat16"  # asked now: building the model changes it
    auto_class = task.auto_class if stage == "finetune" else "AutoModelForCausalLM"
    frozen: frozenset[str] = frozenset()
    if stage == "finetune" and recipe.freeze is not None:
        frozen = freeze_plan(recipe, build_on_meta(config, auto_class), run).frozen_for_good
    length = getattr(training, "max_length", None) or recipe.data.max_length
    batch = training.batch_size or max(1, (training.batch_tokens or 8 * length) // length)
    device = default_device()
    outline = Outline(
        config=config,
        auto_class=auto_class,
        frozen=frozen,
        objective=partial(_objective, task, regularisation_of(training)),
        training=training,
        examples=OneLength(length) if corpus is None else corpus,
        lengths=np.full(batch, length) if corpus is None else corpus.lengths(task.size_column),
        seed=recipe.seed,
        precision=choose_precision(training.precision, device)[0],
        device=device,
        exact_in_bf16=exact,
        adapter=adapter_rules(recipe.finetune.adapter) if stage == "finetune" and recipe.finetune.adapter else None,
    )
    return outline, corpus


def _objective(task: Any, regularisation: Any, model: Any) -> Any:
    return task.objective_of(model, 0, regularisation)


def _config(recipe: Recipe, run: Run, stage: str, corpus: Corpus | None) -> Any:
    """The configuration of the model that is trained: pretraining leaves the one that it starts from."""
    if recipe.pretrain is not None and "pretrain" in recipe.plan and (stage == "pretrain" or recipe.model is None):
        config = PRETRAIN.config(recipe, run)
    else:
        config = load_config(locate_config(str(recipe.model)))
    if stage == "finetune":
        changes = task_for(recipe, run, corpus).model_changes(config) if corpus is not None else {}
        config.update(changes | dropout_changes(config, recipe.finetune.dropout))
    return config


def _job(recipe: Recipe, run: Run, stage: str) -> TrainingJob:
    """The real training; one that comes after pretraining is tried on what pretraining starts from."""
    if stage == "pretrain":
        return PRETRAIN.job(recipe, run)
    done = run.folder("pretrain") / "model"
    if recipe.model is None and not done.is_dir():
        raise RecipeError(
            "fine-tuning cannot be measured before there are weights",
            hint="run `llmkit pretrain` first, or leave --measure out",
            where="pretrain",
        )
    job = FINETUNE.job(recipe, run, done if recipe.model is None else locate(recipe.model))
    if recipe.freeze is not None:
        apply_freeze(job.model, freeze_plan(recipe, job.model, run))
    return with_adapters(job)


def _measured(recipe: Recipe, run: Run, plan: StagePlan, sizing: Sizing) -> StagePlan:
    """The plan with the time that a few real steps, spread over the training, took."""
    job = _job(recipe, run, plan.stage)
    fit = make_fit(job, accelerator_for(job.training, plan.stage))
    chosen = np.unique(np.linspace(0, sizing.steps - 1, _MEASURED_STEPS + 1).astype(int)).tolist()
    seconds = tokens = 0.0
    try:
        with fit.objective.computing():
            fit.train_mode()
            for number, (took, done) in enumerate(_steps(fit, [chosen[0], *chosen])):
                if number:  # the first one warms up
                    seconds, tokens = seconds + took, tokens + done
    finally:
        fit.feeder.close()
    speed = tokens / seconds
    return replace(
        plan,
        seconds=plan.tokens / speed,
        seconds_from=f"{len(chosen)} measured steps at {speed:,.0f} tokens a second",
    )


def _steps(fit: Any, chosen: list[int]) -> Iterator[tuple[float, int]]:
    """Takes steps at the lowest rate; gives the seconds and the tokens of each."""
    for step in chosen:
        started = time.perf_counter()
        result = fit.stepper.step(step, [0.0] * len(fit.base_rates), fit.state.micro_batch_tokens)
        yield time.perf_counter() - started, result.tokens


def matrix_rate(device: torch.device, precision: str) -> float:
    """The floating-point operations a second of a large matrix product, measured now."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size, most = 256, 8192 if device.type == "cuda" else 2048
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        seconds = min(_timed(lambda a=a: a @ a, device) for _ in range(4))  # type: ignore[misc]
        if size == most or seconds > _LONG_ENOUGH:  # a CPU without bf16 takes a minute for the largest
            return 2 * size**3 / seconds
        size *= 2


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
