"""Examples that come block by block, without a known end.

To the loop they are a corpus and an order of batches in one: examples are numbered on from block to block, and so are steps.
Where a training stands is the position of the block that its next step is of, and the first step of that block.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.batches import BatchOrder
from llmkit.data.corpus import Corpus, Example

Position = Any  # a JSON value
MakeBlock = Callable[
    [Position, Path], tuple[Corpus, Position]
]  # the examples at a position, and where the next ones are
_KEPT = 3  # blocks: the one in use, one before it for messages, one that is read ahead


@dataclass(frozen=True)
class _Block:
    position: Position
    corpus: Corpus
    order: BatchOrder
    first_step: int
    first_example: int
    after: Position

    @property
    def end_step(self) -> int:
        return self.first_step + self.order.steps_per_epoch

    @property
    def end_example(self) -> int:
        return self.first_example + len(self.corpus)


class StreamedExamples:
    """Blocks of examples, the next one made while the present one is learnt from; safe to use from two threads."""

    def __init__(
        self,
        make: MakeBlock,
        start: Position,
        folder: Path,
        size_column: str,
        order: Callable[[np.ndarray, int], BatchOrder],
    ) -> None:
        """`order` gives the batches of a block, from its examples' lengths and its first step."""
        self.folder = folder
        self._make, self._order, self._size_column = make, order, size_column
        self._blocks: list[_Block] = []
        self._made = 0
        self._lock = threading.RLock()
        self._worker = ThreadPoolExecutor(1, "llmkit-stream")
        self._next: Future[tuple[Corpus, Position]] | None = None
        self._from = (start, 0)

    def go_to(self, place: dict[str, Any]) -> None:
        """Goes to where `place_of` said that a training stood."""
        with self._lock:
            self._blocks, self._next = [], None
            self._from = (place["position"], place["first_step"])

    def place_of(self, step: int) -> dict[str, Any]:
        """Where to go on from with a step that has been reached."""
        block = self._block_of(step)
        return {"position": block.position, "first_step": block.first_step}

    def batch(self, step: int) -> np.ndarray:
        """The numbers of a step's examples; steps are asked for in ascending order, but for the last few."""
        block = self._block_of(step)
        return block.order.batch(step - block.first_step) + block.first_example

    @property
    def lengths(self) -> _Lengths:
        """The length of an example, by its number."""
        return _Lengths(self)

    def __getitem__(self, number: int) -> Example:
        block = self.block_with(number)
        example: Example = block.corpus[number - block.first_example]
        return example

    def block_with(self, number: int) -> _Block:
        """The block that an example of a recent batch is in."""
        with self._lock:
            return next(block for block in self._blocks if block.first_example <= number < block.end_example)

    def close(self) -> None:
        """Ends the thread, and lets go of the blocks."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _block_of(self, step: int) -> _Block:
        with self._lock:
            while not self._blocks or step >= self._blocks[-1].end_step:
                self._go_on()
            return next(block for block in self._blocks if block.first_step <= step < block.end_step)

    def _go_on(self) -> None:
        last = self._blocks[-1] if self._blocks else None
        position, first_step = (last.after, last.end_step) if last else self._from
        ready = self._next or self._begin(position)
        corpus, after = ready.result()
        order = self._order(corpus.lengths(self._size_column), first_step)
        first_example = last.end_example if last else 0
        self._blocks.append(_Block(position, corpus, order, first_step, first_example, after))
        if len(self._blocks) > _KEPT:
            shutil.rmtree(self._blocks.pop(0).corpus.folder.parent, ignore_errors=True)
        self._next = self._begin(after)

    def _begin(self, position: Position) -> Future[tuple[Corpus, Position]]:
        self._made += 1
        return self._worker.submit(self._make, position, self.folder / f"{self._made:06}")


@dataclass(frozen=True)
class _Lengths:
    examples: StreamedExamples

    def __getitem__(self, number: int) -> int:
        block = self.examples.block_with(number)
        return int(block.order.lengths[number - block.first_example])
