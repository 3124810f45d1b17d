"""Where hidden states of frozen prefixes are kept, and how they come there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from llmkit.data.corpus import Corpus
from llmkit.data.state_pool import PooledStates, StatePool, example_digests, save_examples
from llmkit.data.states import KnownStates, States, StatesWriter, folder_bytes, join_parts, make_room
from llmkit.errors import ArtifactError
from llmkit.files import cache_folder, digest_json
from llmkit.model.objective import Objective
from llmkit.model.prefix import prefix_digest
from llmkit.recipe.schema import Freeze
from llmkit.recipe.values import bytes_of
from llmkit.run.directory import Run
from llmkit.train.prefix import compute_states

STATES_VERSION = 1  # raise it when the same prefix, corpus and precision come to give other states
_SHARE_OF_DISK = 0.25


@dataclass(frozen=True)
class Alone:
    """What an accelerator says of processes, for a stage that only the first one runs."""

    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True

    def wait_for_everyone(self) -> None:
        """Does nothing."""


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
    _digests: dict[int, str] = field(default_factory=dict)
    _examples: dict[str, np.ndarray] = field(default_factory=dict)  # by the corpus's content
    _used: set[Path] = field(default_factory=set)  # folders that this run reads

    @property
    def folder(self) -> Path:
        """All kept states of this user, in folders that are each of one prefix and of examples of one corpus."""
        return cache_folder("prefix")

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that states are kept in; None for the one that they have."""
        return torch.bfloat16 if self.keys.cache_precision == "bf16" else None

    def key(self, corpus: Corpus, depth: int) -> str:
        """The digest of all that decides the states of a corpus at a depth."""
        return digest_json([self.prefix(depth), corpus.content])

    def prefix(self, depth: int) -> str:
        """The digest of all that decides the states of an example at a depth."""
        import transformers

        versions = [STATES_VERSION, torch.__version__, transformers.__version__]
        how = [self.precision, self.keys.cache_precision, self.model.device.type, type(self.objective).__name__]
        if depth not in self._digests:  # which reads all weights before the depth
            self._digests[depth] = prefix_digest(self.model, depth)
        return digest_json([versions, how, self._digests[depth]])

    def find(self, corpus: Corpus, depth: int) -> KnownStates | None:
        """The kept states, or None where any process misses them; damaged ones are removed, and it is said.

        They are those of this corpus, or of all its examples, whatever corpora these were in.
        """
        return self._of_corpus(corpus, depth) or self._of_examples(corpus, depth, whole=True)

    def _of_corpus(self, corpus: Corpus, depth: int) -> States | None:
        key = self.key(corpus, depth)
        folder = self.folder / key[:16]
        return self._opened(folder, key) if any(self._gathered(folder.is_dir())) else None

    def _of_examples(self, corpus: Corpus, depth: int, *, whole: bool) -> PooledStates | None:
        """What is kept of a corpus's examples, wherever; with `whole`, only where that is all of them."""
        pool = StatePool(self.folder, self.prefix(depth))
        while True:
            folders, where = pool.choose(self._digests_of(corpus))
            seen = self._gathered([folder.name for folder in folders])
            if not folders or any(names != seen[0] for names in seen) or (whole and (where < 0).any()):
                return None
            opened = {folder: self._opened(folder, None) for folder in folders}
            states = [each for each in opened.values() if each is not None]
            if len(states) == len(folders):
                return PooledStates(states, where)
            pool = pool.without(folder for folder, each in opened.items() if each is None)

    def _digests_of(self, corpus: Corpus) -> np.ndarray:
        if corpus.content not in self._examples:
            self._examples[corpus.content] = example_digests(corpus)
        return self._examples[corpus.content]

    def _opened(self, folder: Path, key: str | None) -> States | None:
        """The states in a folder, checked; None, and said, where they are damaged for any process or not its own."""
        states, damage = None, ""
        try:
            states = States(folder)
            if key not in (None, states.meta.get("key")):
                raise ArtifactError("kept hidden states belong to other weights", got=states.meta.get("key"))
        except ArtifactError as error:
            damage = f"{error.what}: {error.where or folder}" if folder.is_dir() else ""
            states = None
        known = self._gathered((states is not None, damage))
        for said in filter(None, (said for _, said in known)):
            self.run.reporter.warn(f"{said}; they are computed again")
        if all(there for there, _ in known):
            self._used.add(folder)
            return states
        if self.accelerator.is_main_process and any(said for _, said in known):
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return None

    def compute(self, corpus: Corpus, depths: list[int], what: str) -> dict[int, KnownStates]:
        """Computes and keeps the states of a corpus at some depths, all processes together; none where a disk is full.

        Examples whose states are kept already, from whatever corpus, are left out.
        """
        started = time.monotonic()
        known = {depth: self._of_examples(corpus, depth, whole=False) for depth in depths}
        lent = {depth: states for depth, states in known.items() if states is not None}
        every = [n for n in range(len(corpus)) if len(lent) < len(depths) or not all(k.has(n) for k in lent.values())]
        missing = np.array(every, np.int64)
        keys = {depth: self.key(corpus, depth) for depth in depths}
        if len(missing) < len(corpus):  # then they are no whole corpus's
            keys = {depth: digest_json([key, missing.tolist()]) for depth, key in keys.items()}
        mark = self._agreed(uuid4().hex[:8])
        asides = {depth: self.folder / f".{key[:16]}-{mark}" for depth, key in keys.items()}
        failed, numbers = self._guarded(lambda: self._that_fit(corpus, missing, len(depths)))
        if not failed and not len(numbers):
            self.run.reporter.warn(f"there is no room in {self.folder} for hidden states, within freeze.cache_bytes")
            return dict(lent)
        if not failed:
            failed, _ = self._guarded(lambda: self._write(corpus, numbers, asides, what))
        if not failed:
            failed, _ = self._guarded(lambda: self._publish(corpus, numbers, asides, keys))
        if failed:
            self.run.reporter.warn(
                f"hidden states cannot be kept in {self.folder} ({failed}): the frozen blocks are computed each time; "
                "free some space, or set XDG_CACHE_HOME to a folder with room"
            )
            if self.accelerator.is_main_process:
                for aside in asides.values():
                    shutil.rmtree(aside, ignore_errors=True)
            return {}
        made = {depth: States(self.folder / key[:16]) for depth, key in keys.items()}
        self._used |= {states.folder for states in made.values()}
        size = sum(states.bytes for states in made.values())
        self.run.reporter.note(
            f"frozen prefix: the states of {what} took {time.monotonic() - started:.1f} s and {size / 2**20:,.0f} MiB in "
            f"{self.folder}{_left_out(len(numbers), len(missing), len(corpus))}"
        )
        if len(missing) == len(corpus):
            return dict(made)
        found = {depth: self._of_examples(corpus, depth, whole=False) for depth in depths}
        return {depth: states for depth, states in found.items() if states is not None}

    def _write(self, corpus: Corpus, numbers: np.ndarray, asides: dict[int, Path], what: str) -> None:
        """Writes this process's part of the states."""
        process = int(self.accelerator.process_index)
        mine = numbers[process :: self.accelerator.num_processes].tolist()
        writers = {depth: StatesWriter(aside, process, len(corpus)) for depth, aside in asides.items()}
        progress = self.run.reporter.progress(f"frozen prefix, {what}", len(mine), "examples")
        try:
            compute_states(
                *(self.objective, self.model, corpus, self.size_column, mine),
                *(writers, self.precision, self.dtype, progress.advance),
            )
            for writer in writers.values():
                writer.close()
        finally:
            progress.close()

    def _publish(self, corpus: Corpus, numbers: np.ndarray, asides: dict[int, Path], keys: dict[int, str]) -> None:
        """Joins the parts and gives them their names; in the first process."""
        if not self.accelerator.is_main_process:
            return
        for depth, aside in asides.items():
            meta = {"key": keys[depth], "depth": depth, "corpus": corpus.content, "prefix": self.prefix(depth)}
            meta |= {"examples": save_examples(aside, self._digests_of(corpus), numbers), "created": time.time_ns()}
            join_parts(aside, self.accelerator.num_processes, meta)
            target = self.folder / keys[depth][:16]
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)

    def _guarded(self, work: Callable[[], Any]) -> tuple[str, Any]:
        """What all processes do, and what the disk of any of them had against it."""
        failed, found = "", None
        try:
            found = work()
        except OSError as error:
            failed = str(error)
        return next(filter(None, self._gathered(failed)), ""), found

    def _gathered(self, value: Any) -> list[Any]:
        """A value of each process."""
        if self.accelerator.num_processes == 1:
            return [value]
        from accelerate.utils import gather_object

        return list(gather_object([value]))

    def bytes_a_token(self) -> int:
        """What a token's states take at one depth."""
        width = self.model.config.get_text_config().hidden_size
        size = 2 if self.dtype or self.precision == "bf16" else 4  # fp16 keeps sums in fp32
        return int(width * size)

    def _that_fit(self, corpus: Corpus, missing: np.ndarray, depths: int) -> np.ndarray:
        """The examples that there is room for, from the first on; what was kept longest ago makes room."""
        sizes = corpus.lengths(self.size_column)[missing].cumsum() * self.bytes_a_token() * depths
        self.folder.mkdir(parents=True, exist_ok=True)
        most = cache_bytes(self.keys, self.folder) - sum(folder_bytes(folder) for folder in self._used)
        fitting = int(self._agreed(int(np.searchsorted(sizes, most, side="right"))))
        if fitting and self.accelerator.is_main_process:
            make_room(self.folder, most - int(sizes[fitting - 1]), self._used)
        return missing[:fitting]

    def _agreed(self, value: Any) -> Any:
        """The first process's value, in all of them."""
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


def _left_out(computed: int, missing: int, examples: int) -> str:
    """What is not among the states that were computed, and why."""
    before = f"; those of {examples - missing:,} of {examples:,} examples are there from before"
    room = f"; {missing - computed:,} of {examples:,} examples have no room"
    return before * (missing < examples) + room * (computed < missing)


def cache_bytes(keys: Freeze, folder: Path) -> int:
    """The most bytes that kept states may take: what the recipe says, or a quarter of the disk's free space."""
    if keys.cache_bytes != "auto":
        return bytes_of(keys.cache_bytes)
    return int(shutil.disk_usage(folder).free * _SHARE_OF_DISK)
