"""Whether the frozen prefix is computed once and kept, and at which depths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from llmkit.data.batches import BatchOrder
from llmkit.data.corpus import Corpus
from llmkit.data.states import CorpusWithStates, KnownStates
from llmkit.errors import RecipeError
from llmkit.files import read_json
from llmkit.model.anatomy import blocks_of, read_anatomy
from llmkit.model.freezing import FreezePlan
from llmkit.model.loading import dropout_rates
from llmkit.model.objective import Objective
from llmkit.model.parts import blocks_named
from llmkit.model.prefix import Prefix, frozen_prefix
from llmkit.model.quantized import numbers_in
from llmkit.recipe.schema import Freeze, Recipe
from llmkit.recipe.training import Training
from llmkit.run.directory import Run
from llmkit.stages.prefix_cache import PrefixCache
from llmkit.tasks.base import Known
from llmkit.train.prefix import PrefixObjective, try_prefix
from llmkit.train.thaw import Thaw

Corpora = tuple[Corpus, Corpus | None]  # to train on, and held out
_PASSES_THAT_PAY = 1.5
_LEAST_PASSES = 0.5  # over the data, at one depth


def known_prefix(
    cache: PrefixCache, training: Training, order: BatchOrder, steps: int, thaws: Sequence[Thaw], corpora: Corpora
) -> tuple[Objective, Any, Any]:
    """The objective and the corpora to train on: with the states of the frozen prefix where that is exact and pays.

    Raises RecipeError when the recipe asks for the cache and there can be none.
    """
    train, held_out = corpora
    plain = (cache.objective, train, held_out)
    wanted = cache.keys.cache
    passes = {depth: taken / order.steps_per_epoch for depth, taken in _steps_at(cache.model, thaws, steps).items()}
    depths = _worth_keeping(passes)
    if wanted is False:
        return plain
    if not depths:
        if wanted is True:
            raise RecipeError(
                "the states of the frozen blocks cannot be kept",
                got="no leading blocks that stand still, with the embeddings, long enough",
                hint="freeze the first blocks and the embeddings, or leave `cache` out",
                where="freeze.cache",
            )
        return plain
    prefix = _against(cache, training) or _tried(cache, train, max(depths))
    if isinstance(prefix, str):
        if wanted is True:
            raise RecipeError(
                "the states of the frozen blocks cannot be kept", got=prefix, hint="leave it out", where="freeze.cache"
            )
        cache.run.guess("freeze.cache", False, prefix)
        return plain
    depths = [d for d in depths if d == max(depths) or not isinstance(_tried(cache, train, d), str)]  # each for itself
    going_over = sum(passed for depth, passed in passes.items() if depth)
    evaluations = 1 + (steps // training.eval_every if training.eval_every else 0)
    found = []
    for what, corpus, times in (("training", train, going_over), ("held-out", held_out, evaluations)):
        worth = pays(cache.keys, times)
        states = _states(cache, corpus, depths, f"the {what} data", pays=worth) if corpus is not None else {}
        found.append(CorpusWithStates(corpus, states) if corpus is not None and states else corpus)
    known = any(isinstance(corpus, CorpusWithStates) for corpus in found)
    if wanted == "auto":
        why = f"{max(depths)} blocks stand still before the others; passes over the data: {going_over:.1f}"
        cache.run.guess("freeze.cache", known, why)
    return (PrefixObjective(cache.objective, prefix), found[0], found[1]) if known else plain


def pays(keys: Freeze, passes: float) -> bool:
    """True when states are computed to be kept: asked for, or used so often that it takes less time."""
    return keys.cache is True or passes >= _PASSES_THAT_PAY


@dataclass(frozen=True)
class ForeseenPrefix:
    """The frozen blocks before the others; what keeping their states takes and saves for each token, 0 where none is kept."""

    blocks: int
    bytes_a_token: int = 0
    flops_a_token: float = 0.0


def foreseen_prefix(keys: Freeze | None, model: Any, precision: str, passes: float) -> ForeseenPrefix:
    """What will come of a model's frozen prefix, from its structure and the number of passes over the data."""
    depth = frozen_prefix(model)
    if keys is None or not depth or keys.cache is False or not pays(keys, passes):
        return ForeseenPrefix(depth)
    size = 2 if precision == "bf16" or keys.cache_precision == "bf16" else 4
    weights = sum(numbers_in(block) for block in blocks_of(model)[:depth])
    return ForeseenPrefix(depth, model.config.get_text_config().hidden_size * size, 2.0 * weights)


def _states(cache: PrefixCache, corpus: Corpus, depths: list[int], what: str, *, pays: bool) -> dict[int, KnownStates]:
    """Kept states by depth, and those that are not kept yet where that pays."""
    found = _found(cache, corpus, depths, what)
    missing = [depth for depth in depths if depth not in found]
    return found | (cache.compute(corpus, missing, what) if missing and pays and len(corpus) else {})


def _found(cache: PrefixCache, corpus: Corpus, depths: list[int], what: str) -> dict[int, KnownStates]:
    found = {depth: states for depth in depths if (states := cache.find(corpus, depth)) is not None}
    if found:
        cache.run.reporter.note(f"frozen prefix: the states of {what} are there from before")
    return found


def known_to_score(cache: PrefixCache, corpus: Corpus, depth: int, passes: float, what: str) -> Known | None:
    """What leaves the frozen prefix of a model that is scored: states that are kept, or come to be used in more passes."""
    found = _found(cache, corpus, [depth], what)
    if not found and not pays(cache.keys, passes):
        return None
    prefix = _tried(cache, corpus, depth)
    if isinstance(prefix, str):
        cache.run.reporter.note(f"frozen prefix: computed for {what}: {prefix}")
        return None
    states = found or cache.compute(corpus, [depth], what)
    return Known(PrefixObjective(cache.objective, prefix), CorpusWithStates(corpus, states)) if states else None


def depth_for_good(recipe: Recipe, run: Run, model: Any) -> int:
    """How many leading blocks never move, with all that leads into them, by the run's freeze plan; 0 without one.

    `model`, which may be on the meta device, is the one that the recipe trains, without adapters.
    """
    if "freeze" not in recipe.plan or not run.is_done("freeze"):
        return 0
    anatomy, adapter = read_anatomy(model), recipe.finetune.adapter
    frozen = FreezePlan.from_json(read_json(run.folder("freeze") / "freeze.json")).frozen_for_good
    if adapter is not None:  # then nothing below the first of them moves, but with 4 bits it is not the parent's either
        asked = adapter.blocks if adapter.name != "qlora" else None
        first = min(blocks_named(asked, anatomy, "adapter"), default=0) if asked else 0
        frozen = frozen.union(anatomy.embeddings, *anatomy.blocks[:first])
    return anatomy.frozen_prefix(frozen)


def keep_states(cache: PrefixCache, training: Training, corpus: Corpus, depths: list[int], what: str) -> None:
    """Sees to it that states are kept, where they can be."""
    if depths and not isinstance(_against(cache, training) or _tried(cache, corpus, max(depths)), str):
        _states(cache, corpus, depths, what, pays=True)


def _steps_at(model: Any, thaws: Sequence[Thaw], steps: int) -> dict[int, int]:
    """How many steps are taken on top of so many frozen blocks."""
    found: dict[int, int] = defaultdict(int)
    starts = sorted({0, *(thaw.step for thaw in thaws)})
    for start, end in pairwise([*starts, steps]):
        held = {name for thaw in thaws if thaw.step > start for name in thaw.names}
        found[frozen_prefix(model, held)] += end - start
    return found


def _worth_keeping(passes: dict[int, float]) -> list[int]:
    """The depths that half a pass over the data or more goes by, each with what is deeper and not kept itself."""
    kept, waiting = [], 0.0
    for depth in sorted(passes, reverse=True):
        waiting += passes[depth]
        if depth and waiting >= _LEAST_PASSES:
            kept.append(depth)
            waiting = 0.0
    return kept


def _against(cache: PrefixCache, training: Training) -> str | None:
    """What in the recipe makes the states other ones each time, or None."""
    if training.neftune_alpha:
        return "neftune_alpha puts noise into the embeddings"
    if cache.keys.dropout and any(dropout_rates(cache.model.config).values()):
        return "freeze.dropout leaves dropout in the frozen blocks"
    if any(rate for name, rate in cache.model.config.to_dict().items() if "layerdrop" in name):
        return "layerdrop leaves blocks out at random"
    return None


def _tried(cache: PrefixCache, corpus: Corpus, depth: int) -> Prefix | str:
    order = np.argsort(corpus.lengths(cache.size_column), kind="stable")
    chosen = np.unique([0, len(order) // 2, len(order) - 1])  # of unlike length
    examples = [corpus[int(number)] for number in order[chosen]]
    return try_prefix(cache.objective, cache.model, depth, examples, cache.precision)
