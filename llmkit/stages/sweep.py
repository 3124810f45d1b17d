"""How much to freeze, by evidence: trainings at several depths, from the head alone to everything, on the recipe's own data.

They are cheap because the frozen prefix of each is computed once, for all of them in one pass. What has been tried is
written down at once, so that a sweep that is stopped goes on from there.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmkit.data.corpus import Corpus
from llmkit.errors import DivergedError, RecipeError
from llmkit.files import digest_json, read_json, write_json
from llmkit.model.anatomy import read_anatomy
from llmkit.model.freezing import FreezePlan, apply_freeze, plan_freeze
from llmkit.model.parts import Parts
from llmkit.model.precision import choose_precision
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import seconds_of
from llmkit.run.directory import Run
from llmkit.run.reporter import SilentReporter
from llmkit.stages.base import model_before
from llmkit.stages.evaluate import scoring_for
from llmkit.stages.finetune import STAGE as FINETUNE
from llmkit.stages.finetune import with_adapters
from llmkit.stages.job import TrainingJob
from llmkit.stages.prefix import keep_states
from llmkit.stages.prefix_cache import PrefixCache
from llmkit.stages.training import accelerator_for, make_fit, regularisation_of
from llmkit.train.masters import Masters

_POINTS = 0.005  # of accuracy that count as nothing
_SHARE_OF_LOSS = 0.01  # that counts as nothing
_BAR = 16  # characters


@dataclass(frozen=True)
class Trial:
    """One depth: how many of the last blocks were trained, or everything; the seconds of its training, and its score."""

    name: str
    blocks: int | None  # None for everything, embeddings too
    trainable_parameters: int
    seconds: float
    loss: float
    accuracy: float | None

    def parts(self, blocks: int) -> Parts:
        """What stands still in a model of so many blocks."""
        return _parts(self.blocks, blocks)


@dataclass(frozen=True)
class Sweep:
    """What was tried, cheapest first; the recommendation and its reason; and what the budget left out."""

    trials: tuple[Trial, ...]
    recommended: Trial
    reason: str
    left_out: tuple[str, ...] = ()


def depths_to_try(blocks: int) -> list[int | None]:
    """The last 0, 1, 2, 4, 8 ... blocks, and everything."""
    powers = [2**n for n in range(blocks.bit_length()) if 2**n < blocks]
    return [0, *powers, None]


def recommend(trials: Sequence[Trial]) -> tuple[Trial, str]:
    """The quickest trial that is as good as the best but for what counts as nothing, and why."""
    if trials[0].accuracy is not None:
        best = max(trials, key=lambda trial: trial.accuracy or 0.0)
        good = [trial for trial in trials if (trial.accuracy or 0.0) >= (best.accuracy or 0.0) - _POINTS]
        what, margin = "accuracy", "half a point"
    else:
        best = min(trials, key=lambda trial: trial.loss)
        good = [trial for trial in trials if trial.loss <= best.loss * (1 + _SHARE_OF_LOSS)]
        what, margin = "loss", "1 %"
    chosen = min(good, key=lambda trial: trial.seconds)
    score = chosen.accuracy if what == "accuracy" else chosen.loss
    if chosen is best:
        return chosen, f"the best {what}, {score:.4f}; nothing that is quicker comes within {margin}"
    top = best.accuracy if what == "accuracy" else best.loss
    share = chosen.seconds / max(best.seconds, 1e-9)
    return (
        chosen,
        f"{what} {score:.4f}, within {margin} of the best ({top:.4f}, {best.name}), in {share:.0%} of its time",
    )


def sweep(recipe: Recipe, run: Run) -> Sweep:
    """Tries the depths, within the budget. Raises RecipeError where there is nothing to compare on."""
    job = FINETUNE.job(recipe, run, model_before(recipe, run, "finetune"))
    keys = recipe.freeze
    assert keys is not None, "a sweep is asked for by `freeze`"
    if job.held_out is None or not len(job.held_out):
        raise RecipeError(
            "depths are compared on held-out data, and there are none", expected="`data.eval`", where="freeze.blocks"
        )
    accelerator = accelerator_for(job.training, "finetune")
    if accelerator.num_processes > 1:
        raise RecipeError(
            "a sweep runs in one process",
            got=f"{accelerator.num_processes} processes",
            hint="run `llmkit freeze` with this recipe alone first; the others then find what it chose",
            where="freeze.blocks",
        )
    blocks = len(read_anatomy(job.model).blocks)
    folder = run.folder("freeze")
    done = _done(folder, run)
    candidates = depths_to_try(blocks)[recipe.finetune.adapter is not None :]  # adapters are for blocks
    if len(done) < len(candidates):
        _compute_states(job, accelerator, [blocks - k for k in candidates if k is not None])
    budget = seconds_of(keys.budget) if keys.budget is not None else float("inf")
    left_out = []
    for k in candidates:
        if any(trial.blocks == k for trial in done):
            continue
        name = _name(k)
        foreseen = done[-1].seconds * 1.5 if done else 0.0  # each trains more than the one before it
        if done and sum(trial.seconds for trial in done) + foreseen > budget:
            left_out.append(name)
            continue
        try:
            trial = _try(recipe, run, accelerator, k, blocks)
        except DivergedError as error:
            run.reporter.warn(f"{name} diverged: {error.got}")
            continue
        done.append(trial)
        write_json(folder / "sweep.json", {"inputs": _inputs(run), "trials": [asdict(trial) for trial in done]})
        score = f"loss {trial.loss:.4f}" if trial.accuracy is None else f"accuracy {trial.accuracy:.4f}"
        run.reporter.note(f"{name}: {score} in {trial.seconds:.1f} s")
    shutil.rmtree(folder / "trials", ignore_errors=True)
    if not done:
        raise DivergedError("training diverged at every depth", hint="lower finetune.lr", where="freeze.blocks")
    chosen, reason = recommend(done)
    return Sweep(tuple(done), chosen, reason, tuple(left_out))


def sweep_rows(found: Sweep) -> list[tuple[str, ...]]:
    """A line for each trial, with bars: what was trained, parameters, seconds, score."""
    slowest = max(1e-9, *(trial.seconds for trial in found.trials))
    rows: list[tuple[str, ...]] = []
    for trial in found.trials:
        mark = "->" if trial is found.recommended else ""
        seconds = f"{trial.seconds:,.1f} {'█' * max(1, round(_BAR * trial.seconds / slowest))}"
        accuracy = "" if trial.accuracy is None else f"{trial.accuracy:.4f}"
        rows.append((mark, trial.name, f"{trial.trainable_parameters:,}", seconds, f"{trial.loss:.4f}", accuracy))
    return rows


def _done(folder: Path, run: Run) -> list[Trial]:
    """What an earlier try of this very sweep found."""
    path = folder / "sweep.json"
    found = read_json(path) if path.is_file() else {}
    return [Trial(**trial) for trial in found.get("trials", [])] if found.get("inputs") == _inputs(run) else []


def _inputs(run: Run) -> str:
    return digest_json(run.stage("freeze").get("inputs"))


def _compute_states(job: TrainingJob, accelerator: Any, depths: list[int]) -> None:
    """Keeps the states at all depths, in one pass over the data."""
    assert job.freezes is not None, "it is a sweep of `freeze`"
    if job.freezes.cache is False:
        return
    precision, _ = choose_precision(job.training.precision, accelerator.device)
    model = job.model.to(accelerator.device).requires_grad_(False)
    model.config.use_cache = False
    objective = job.task.objective(model, regularisation_of(job.training))
    Masters(model, precision)
    cache = PrefixCache(job.freezes, job.run, objective, model, job.task.size_column, precision, accelerator)
    for corpus, what in ((job.train, "the training data"), (job.held_out, "the held-out data")):
        if isinstance(corpus, Corpus):
            keep_states(cache, job.training, corpus, sorted({depth for depth in depths if depth}), what)


def _try(recipe: Recipe, run: Run, accelerator: Any, k: int | None, blocks: int) -> Trial:
    """Trains the last k blocks, quietly and in a folder of its own."""
    folder = run.folder("freeze") / "trials" / f"{'all' if k is None else k}"
    (folder / "finetune").mkdir(parents=True, exist_ok=True)
    aside = Run(folder, {"stages": {"finetune": {"fingerprint": _inputs(run)}}, "guesses": {}}, SilentReporter(), None)
    quiet = Run(run.path, {**run.record, "guesses": {}}, SilentReporter(), None)
    job = FINETUNE.job(recipe, quiet, model_before(recipe, run, "finetune"))
    plan = plan_freeze(job.model, _parts(k, blocks))
    apply_freeze(job.model, plan)
    job = with_adapters(job)
    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    training = job.training.model_copy(update={"trackers": ()})
    fit = make_fit(replace(job, run=aside, training=training), accelerator)
    fit.resume()
    started, before = time.monotonic(), fit.state.seconds
    state = fit.run([])
    seconds = before + time.monotonic() - started
    fit.release()
    assert job.held_out is not None, "it was asked for"
    scoring = replace(scoring_for(recipe, len(job.held_out), fit.precision), generate=0, samples=0)
    scores = job.task.evaluate(fit.model.eval(), job.held_out, scoring).metrics if _classifies(job) else {}
    loss = state.best_loss if job.training.keep == "best" else state.eval_loss
    assert loss is not None, "there are held-out data"
    shutil.rmtree(folder, ignore_errors=True)
    return Trial(_name(k), k, trained, round(max(seconds, 0.001), 3), loss, scores.get("accuracy"))


def _classifies(job: TrainingJob) -> bool:
    return "accuracy" in job.task.metrics


def _parts(k: int | None, blocks: int) -> Parts:
    if k is None:
        return Parts()
    return Parts(blocks=f"0-{blocks - k - 1}", embeddings=True)


def _name(k: int | None) -> str:
    if k is None:
        return "everything"
    return "the head alone" if k == 0 else f"the last {k} blocks" if k > 1 else "the last block"


def chosen_plan(found: Sweep, model: Any) -> FreezePlan:
    """The freeze plan of the recommendation."""
    plan = plan_freeze(model, found.recommended.parts(len(read_anatomy(model).blocks)))
    return replace(plan, reasons={**plan.reasons, "chosen by a sweep": found.reason})
