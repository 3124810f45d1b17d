"""Whether the frozen prefix is computed once and kept, where, and what that takes."""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from llmkit.data.batches import BatchOrder
from llmkit.data.corpus import Corpus
from llmkit.data.states import CorpusWithStates, States, StatesWriter, join_parts, make_room
from llmkit.errors import ArtifactError, RecipeError
from llmkit.files import digest_json
from llmkit.model.loading import dropout_rates
from llmkit.model.objective import Objective
from llmkit.model.prefix import Prefix, frozen_prefix, prefix_digest
from llmkit.recipe.schema import Freeze
from llmkit.recipe.training import Training
from llmkit.recipe.values import bytes_of
from llmkit.run.directory import Run
from llmkit.train.prefix import PrefixObjective, compute_states, try_prefix
from llmkit.train.thaw import Thaw

Corpora = tuple[Corpus, Corpus | None]  # to train on, and held out
STATES_VERSION = 1  # raise it when the same prefix, corpus and precision come to give other states
_PASSES_THAT_PAY = 1.5
_LEAST_PASSES = 0.5  # over the data, at one depth
_SHARE_OF_DISK = 0.25
_EXAMPLES_TO_TRY = 4


@dataclass
class PrefixCache:
    """Where states of one model's prefix are kept, and how they are computed where they are not there yet."""

    keys: Freeze
    run: Run
    objective: Objective
    model: Any
    size_column: str
    precision: str
    accelerator: Any

    @property
    def folder(self) -> Path:
        """All kept states of this user, one folder for each prefix and corpus."""
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmkit" / "prefix"

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that states are kept in; None for the one that they have."""
        return torch.bfloat16 if self.keys.cache_precision == "bf16" else None

    def key(self, corpus: Corpus, depth: int) -> str:
        """The digest of all that decides the states of a corpus at a depth."""
        import transformers

        versions = [STATES_VERSION, torch.__version__, transformers.__version__]
        how = [self.precision, self.keys.cache_precision, self.model.device.type, type(self.objective).__name__]
        return digest_json([versions, how, corpus.content, prefix_digest(self.model, depth)])

    def find(self, corpus: Corpus, depth: int) -> States | None:
        """The kept states, or None; damaged ones are removed, and it is said."""
        key = self.key(corpus, depth)
        folder = self.folder / key[:16]
        if not folder.is_dir():
            return None
        try:
            states = States(folder)
            if states.meta.get("key") != key:
                raise ArtifactError("kept hidden states belong to other weights", got=states.meta.get("key"))
        except ArtifactError as error:
            self.run.reporter.warn(f"{error.what}: {error.where or folder}; they are computed again")
            if self.accelerator.is_main_process:
                shutil.rmtree(folder, ignore_errors=True)
            return None
        return states

    def compute(self, corpus: Corpus, depths: list[int], what: str) -> dict[int, States]:
        """Computes and keeps the states of a corpus at some depths, all processes together; none where a disk is full."""
        started = time.monotonic()
        numbers = self._that_fit(corpus, len(depths))
        if not len(numbers):
            return {}
        keys = {depth: self.key(corpus, depth) for depth in depths}
        mark, processes, process = self._agreed(uuid4().hex[:8]), self.accelerator.num_processes, self._process
        asides = {depth: self.folder / f".{key[:16]}-{mark}" for depth, key in keys.items()}
        progress = self.run.reporter.progress(f"frozen prefix, {what}", len(numbers[process::processes]), "examples")
        failed: OSError | None = None
        try:
            writers = {depth: StatesWriter(aside, process, len(corpus)) for depth, aside in asides.items()}
            compute_states(
                *(self.objective, self.model, corpus, self.size_column, numbers[process::processes].tolist()),
                *(writers, self.precision, self.dtype, progress.advance),
            )
            for writer in writers.values():
                writer.close()
        except OSError as error:
            failed = error
        finally:
            progress.close()
        if self._any(failed is not None):
            self.run.reporter.warn(
                f"hidden states cannot be kept in {self.folder} ({failed or 'in another process'}): the frozen blocks "
                "are computed each time; free some space, or set XDG_CACHE_HOME to a folder with room"
            )
            self._remove(list(asides.values()))
            return {}
        if self.accelerator.is_main_process:
            for depth, aside in asides.items():
                join_parts(aside, processes, {"key": keys[depth], "depth": depth, "corpus": corpus.content})
                target = self.folder / keys[depth][:16]
                shutil.rmtree(target, ignore_errors=True)
                aside.rename(target)
        self.accelerator.wait_for_everyone()
        found = {depth: States(self.folder / key[:16]) for depth, key in keys.items()}
        size = sum(states.bytes for states in found.values())
        left = f"; {len(corpus) - len(numbers):,} of {len(corpus):,} examples have no room" * (
            len(numbers) < len(corpus)
        )
        self.run.reporter.note(
            f"frozen prefix: the states of {what} took {time.monotonic() - started:.1f} s and {size / 2**20:,.0f} MiB in "
            f"{self.folder}{left}"
        )
        return found

    def bytes_a_token(self) -> int:
        """What a token's states take at one depth."""
        width = self.model.config.get_text_config().hidden_size
        size = 2 if self.dtype or self.precision != "fp32" else 4
        return int(width * size)

    def _that_fit(self, corpus: Corpus, depths: int) -> np.ndarray:
        """The examples that there is room for, from the first on; what was kept longest ago makes room."""
        sizes = corpus.lengths(self.size_column).cumsum() * self.bytes_a_token() * depths
        self.folder.mkdir(parents=True, exist_ok=True)
        most = cache_bytes(self.keys, self.folder)
        fitting = int(np.searchsorted(sizes, most, side="right"))
        fitting = int(self._agreed(fitting))
        if fitting and self.accelerator.is_main_process:
            make_room(self.folder, most - int(sizes[fitting - 1]))
        return np.arange(fitting)

    @property
    def _process(self) -> int:
        return int(self.accelerator.process_index)

    def _agreed(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def _any(self, value: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import gather_object

        return any(gather_object([value]))

    def _remove(self, folders: list[Path]) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)


def cache_bytes(keys: Freeze, folder: Path) -> int:
    """The most bytes that kept states may take: what the recipe says, or a quarter of the disk's free space."""
    if keys.cache_bytes != "auto":
        return bytes_of(keys.cache_bytes)
    return int(shutil.disk_usage(folder).free * _SHARE_OF_DISK)


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
    if not depths or wanted is False:
        return plain
    prefix = _against(cache, training) or _tried(cache, train, max(depths))
    if isinstance(prefix, str):
        if wanted is True:
            raise RecipeError(
                "the states of the frozen blocks cannot be kept", got=prefix, hint="leave it out", where="freeze.cache"
            )
        cache.run.guess("freeze.cache", False, prefix)
        return plain
    going_over = sum(passed for depth, passed in passes.items() if depth)
    evaluations = 1 + (steps // training.eval_every if training.eval_every else 0)
    found = []
    for what, corpus, times in (("training", train, going_over), ("held-out", held_out, evaluations)):
        pays = wanted is True or times >= _PASSES_THAT_PAY
        states = _states(cache, corpus, depths, f"the {what} data", pays=pays) if corpus is not None else {}
        found.append(CorpusWithStates(corpus, states) if corpus is not None and states else corpus)
    known = any(isinstance(corpus, CorpusWithStates) for corpus in found)
    if wanted == "auto":
        why = f"{max(depths)} blocks stand still before the others, and {going_over:.1f} passes go over the data"
        cache.run.guess("freeze.cache", known, why)
    return (PrefixObjective(cache.objective, prefix), found[0], found[1]) if known else plain


def _states(cache: PrefixCache, corpus: Corpus, depths: list[int], what: str, *, pays: bool) -> dict[int, States]:
    """Kept states by depth, and those that are not kept yet where that pays."""
    found = {depth: states for depth in depths if (states := cache.find(corpus, depth)) is not None}
    if found:
        cache.run.reporter.note(f"frozen prefix: the states of {what} are there from before")
    missing = [depth for depth in depths if depth not in found]
    return found | (cache.compute(corpus, missing, what) if missing and pays and len(corpus) else {})


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
    return None


def _tried(cache: PrefixCache, corpus: Corpus, depth: int) -> Prefix | str:
    examples = [corpus[number] for number in range(min(_EXAMPLES_TO_TRY, len(corpus)))]
    return try_prefix(cache.objective, cache.model, depth, examples, cache.precision)
