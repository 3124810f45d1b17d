"""From a global batch to micro-batches that fit in memory, prepared while the step before still computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llmkit.data.batches import BatchOrder
from llmkit.data.corpus import Corpus
from llmkit.data.states import CorpusWithStates
from llmkit.model.objective import Batch, Objective
from llmkit.train.mesh import Mesh
from llmkit.train.stream import StreamedExamples

_MOST_PADDING = 0.03  # of what is computed


def cut(
    numbers: Iterable[int], lengths: Any, *, padded: bool, tokens: int | None, examples: int | None = None
) -> list[list[int]]:
    """Examples in parts of at most so many tokens, padding included, and examples; one example always makes a part.

    `lengths` gives that of an example by its number. Padded parts hold examples of like length, so that at most 3 % of
    them is padding.
    """
    ordered = sorted(numbers, key=lambda number: -lengths[number]) if padded else list(numbers)
    parts: list[list[int]] = []
    used = 0
    for number in ordered:
        length = int(lengths[number])
        if parts:
            count = len(parts[-1]) + 1
            computed = int(lengths[parts[-1][0]]) * count if padded else used + length  # the first is the longest
            fits = (tokens is None or computed <= tokens) and (examples is None or count <= examples)
            if fits and computed - used - length <= _MOST_PADDING * computed:
                parts[-1].append(number)
                used += length
                continue
        parts.append([number])
        used = length
    return parts


def cut_corpus(
    corpus: Corpus | CorpusWithStates | StreamedExamples,
    numbers: Sequence[int],
    lengths: Any,
    *,
    padded: bool,
    tokens: int | None,
    examples: int | None = None,
) -> list[list[int]]:
    """The same, examples with known states apart from the others: what is batched together is left out together."""
    groups = corpus.apart(numbers) if isinstance(corpus, CorpusWithStates) else [numbers]
    return [part for some in groups for part in cut(some, lengths, padded=padded, tokens=tokens, examples=examples)]


@dataclass
class Feeder:
    """One process's micro-batches of each step."""

    corpus: Corpus | CorpusWithStates | StreamedExamples
    order: BatchOrder | StreamedExamples
    objective: Objective
    mesh: Mesh
    micro_batch_size: int | None
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "llmkit-batches"))
    _ahead: dict[tuple[int, int | None], Future[list[Batch]]] = field(default_factory=dict)

    def take(self, step: int, tokens: int | None) -> list[Batch]:
        """The micro-batches of a 0-based step, of at most so many tokens; those of the next one are begun.

        A process without a share of a small batch gets one example, so that it takes part.
        """
        ready = self._ahead.pop((step, tokens), None)
        batches = ready.result() if ready else self._prepare(step, tokens)
        self._ahead = {(step + 1, tokens): self._worker.submit(self._prepare, step + 1, tokens)}
        return batches

    def has_share(self, step: int) -> bool:
        """True when this process has examples of its own in a step."""
        return len(self.order.batch(step)) > self.mesh.share

    def forget(self) -> None:
        """Drops what was prepared ahead."""
        for ready in self._ahead.values():
            ready.result()
        self._ahead = {}

    def close(self) -> None:
        """Ends the thread that prepares."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, step: int, tokens: int | None) -> list[Batch]:
        numbers = self.order.batch(step).tolist()
        mine = numbers[self.mesh.share :: self.mesh.shares] or numbers[:1]
        padded, size = self.objective.padded, self.micro_batch_size
        parts = cut_corpus(self.corpus, mine, self.order.lengths, padded=padded, tokens=tokens, examples=size)
        return [self.objective.collate([self.corpus[number] for number in part]) for part in parts]
