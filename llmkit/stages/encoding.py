"""Canonical rows to examples, a shard at a time: each a pure function of the shard and of how it is encoded."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llmkit import catalog
from llmkit.data.augment import build_augmentations
from llmkit.data.corpus import Column, Corpus, CorpusWriter
from llmkit.data.gather import Kept, RowPart, RowSet
from llmkit.data.shards import LEFT_OUT, left_out_line
from llmkit.data.split import copies, position
from llmkit.data.workers import in_order
from llmkit.model.loading import load_tokenizer
from llmkit.run.directory import Run
from llmkit.stages.origins import FILES, join_origins, save_origins
from llmkit.tasks.base import Encoded, Task, TaskSettings

_ROWS = "examples-of-rows.npy"
_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 2 << 20
_BYTES_FOR_PROCESSES = 8 << 20  # less is done before the processes have started
SOURCE = Column("uint16", ragged=False)  # of each example: the number of its source in `meta["sources"]`


@dataclass(frozen=True)
class Encoding:
    """How rows become examples."""

    task: str
    tokenizer: Path
    settings: TaskSettings
    weighed: bool = False  # rows to learn from stand in the corpus as often as their weight says
    augment: tuple[Any, ...] = field(default=(), hash=False)  # what the recipe names, for rows to learn from
    seed: int = 0

    def copies(self, kept: Kept) -> int:
        """How often a row stands in the corpus."""
        return copies(kept.row, kept.weight) if self.weighed else 1


@dataclass(frozen=True)
class EncodingTask:
    """Some rows of a shard, the number of their source, the folder for their examples, and how they are made."""

    part: RowPart
    source: int
    folder: Path
    encoding: Encoding


@dataclass(frozen=True)
class Wanted:
    """A corpus to be made; `task` is what `encoding` tells of."""

    name: str
    rows: RowSet
    encoding: Encoding
    task: Task


class Encoder:
    """Encodes parts, one after the other; a process makes each task once."""

    def __init__(self, tasks: Mapping[Encoding, Task] = MappingProxyType({})) -> None:
        self._tasks = dict(tasks)

    def __call__(self, work: EncodingTask) -> Path:
        """Writes a part's examples as a corpus."""
        how = work.encoding
        if how not in self._tasks:
            self._tasks[how] = catalog.resolve("task", how.task)(load_tokenizer(how.tokenizer), how.settings)
        return encode_part(self._tasks[how], work)


@dataclass
class Examples:
    """A corpus in parts; `kept` are masks of the examples to keep of each, None for all."""

    task: Task
    parts: list[Corpus]
    sources: list[str]
    kept: list[np.ndarray] | None = None

    def rows_kept(self) -> int:
        """The rows that have an example left."""
        if self.kept is None:
            return sum(part.meta["rows"] for part in self.parts)
        counts = [np.load(part.folder / _ROWS) for part in self.parts]
        owners = [np.repeat(np.arange(len(count)), count) for count in counts]
        gone = [np.bincount(o[~k], minlength=len(c)) for o, k, c in zip(owners, self.kept, counts, strict=True)]
        return sum(int(np.sum((count == 0) | (lost < count))) for count, lost in zip(counts, gone, strict=True))


def encode_part(task: Task, work: EncodingTask) -> Path:
    """Writes a part's examples as a corpus, and `left_out.jsonl`. What is there already stays."""
    encoding = work.encoding
    if (work.folder / "corpus.json").exists():
        return work.folder
    aside = work.folder.with_name(f".{work.folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    writer = CorpusWriter(aside, {**task.columns, "source": SOURCE})
    cut = lost = 0
    examples_of: list[int] = []  # each row
    files: list[int] = []  # of each example
    lines: list[int] = []
    number_of = {name: number for number, name in enumerate(work.part.shard.facts["sources"])}
    rejected: dict[str, list[Any]] = {}
    encoded_rows = _augmented(encoding, task, work.part) if encoding.augment else _repeated(encoding, task, work.part)
    with (aside / LEFT_OUT).open("w", encoding="utf-8") as left_out:
        for kept, encoded in encoded_rows:
            if not isinstance(encoded, Encoded):
                rejected.setdefault(encoded, [0, str(kept.where)])[0] += 1
                left_out.write(left_out_line(kept.where, encoded))
                continue
            for example in encoded.examples:
                writer.add({**example, "source": work.source})
            files += [number_of[kept.where.source]] * len(encoded.examples)
            lines += [kept.where.line] * len(encoded.examples)
            examples_of.append(len(encoded.examples))
            cut += encoded.lost_tokens > 0
            lost += encoded.lost_tokens
    np.save(aside / _ROWS, np.array(examples_of, np.int64))
    save_origins(aside, files, lines)
    meta = {"rows": len(examples_of), "rows_cut": cut, "tokens_cut": lost, "rejected": rejected, FILES: list(number_of)}
    writer.finish(meta)
    aside.rename(work.folder)
    return work.folder


def _repeated(encoding: Encoding, task: Task, part: RowPart) -> Iterator[tuple[Kept, Encoded | str]]:
    for kept, encoded in encode_rows(task, part):
        if isinstance(encoded, Encoded) and encoding.weighed:
            encoded = replace(encoded, examples=encoded.examples * encoding.copies(kept))
        yield kept, encoded


def _augmented(encoding: Encoding, task: Task, part: RowPart) -> Iterator[tuple[Kept, Encoded | str]]:
    """Rows with random changes, each copy with its own; they depend on the seed and on what the row says alone."""
    augmentations = [each for _, each in build_augmentations(encoding.augment)]
    on_rows: list[Any] = [each for each in augmentations if not each.on_tokens]
    on_tokens: list[Any] = [each for each in augmentations if each.on_tokens]
    for batch in _rows_in_batches(part):
        counts = [encoding.copies(kept) for kept in batch]
        copied = [(kept, copy) for kept, count in zip(batch, counts, strict=True) for copy in range(count)]
        generators = [_generator(encoding.seed, kept, copy) for kept, copy in copied]
        rows = [kept.row for kept, _ in copied]
        for change in on_rows:
            rows = [change(row, random) for row, random in zip(rows, generators, strict=True)]
        encoded = zip(task.encode(rows), generators, strict=True)
        for kept, count in zip(batch, counts, strict=True):
            made = list(islice(encoded, count))
            good = [(each, random) for each, random in made if isinstance(each, Encoded)]
            if made and not good:
                yield kept, made[0][0]
                continue
            examples = [(example, random) for each, random in good for example in each.examples]
            for change in on_tokens:
                examples = [(change(example, random, task.tokenizer), random) for example, random in examples]
            yield kept, Encoded([example for example, _ in examples], sum(each.lost_tokens for each, _ in good))


def _generator(seed: int, kept: Kept, copy: int) -> np.random.Generator:
    return np.random.default_rng([seed, int(position(kept.row, "augment") * 2**53), copy])


def encode_rows(task: Task, part: RowPart) -> Iterator[tuple[Kept, Encoded | str]]:
    """Each row with its examples, or the reason why it has none; as many at a time as memory holds with ease."""
    for batch in _rows_in_batches(part):
        yield from zip(batch, task.encode([kept.row for kept in batch]), strict=True)


def _rows_in_batches(part: RowPart) -> Iterator[list[Kept]]:
    for numbers in _batches(part.shard.row_bytes[part.numbers]):
        yield list(RowPart(part.shard, part.numbers[numbers], part.weight))


def _batches(sizes: np.ndarray) -> Iterator[slice]:
    start, total = 0, 0
    for end, size in enumerate(sizes.tolist()):
        if end > start and (total + size > _BYTES_AT_ONCE or end - start == _ROWS_AT_ONCE):
            yield slice(start, end)
            start, total = end, 0
        total += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def encode_all(
    run: Run, wanted: Sequence[Wanted], folder: Path, workers: int
) -> tuple[dict[str, list[Corpus]], dict[str, list[str]]]:
    """Encodes sets of rows, each as one corpus a shard; gives these by name, and the URIs that sources are numbers of."""
    sources = {w.name: list(dict.fromkeys(part.shard.facts["uri"] for part in w.rows.parts)) for w in wanted}
    tasks = []
    for each in wanted:
        (folder / each.name).mkdir(parents=True, exist_ok=True)
        for number, part in enumerate(each.rows.parts):
            if len(part.numbers):
                source = sources[each.name].index(part.shard.facts["uri"])
                tasks.append(EncodingTask(part, source, folder / each.name / f"{number:05}", each.encoding))
    total = sum(int(task.part.shard.row_bytes[task.part.numbers].sum()) for task in tasks)
    made = {each.encoding: each.task for each in wanted}
    make: Any = Encoder if total >= _BYTES_FOR_PROCESSES and workers > 1 else lambda: Encoder(made)
    progress = run.reporter.progress("encoding", sum(len(task.part.numbers) for task in tasks), "rows")
    found: dict[str, list[Corpus]] = {each.name: [] for each in wanted}
    try:
        for work, path in in_order(make, tasks, workers if make is Encoder else 1):
            found[work.folder.parent.name].append(Corpus(path))
            progress.advance(len(work.part.numbers))
    finally:
        progress.close()
    return found, sources


def joined(folder: Path, examples: Examples, tokenizer: Any) -> Corpus:
    """The parts of a corpus as one, without what is left out."""
    task = examples.task
    kept: Sequence[np.ndarray | None] = examples.kept or (None,) * len(examples.parts)
    writer = CorpusWriter(folder, {**task.columns, "source": SOURCE})
    for part, mask in zip(examples.parts, kept, strict=True):
        writer.add_all(part, mask)
    counts = {key: sum(part.meta[key] for part in examples.parts) for key in ("rows_cut", "tokens_cut")}
    counts["rows"] = examples.rows_kept()
    settings = vars(task.settings) | {"labels": list(task.settings.labels)}
    identity = task.describe() | {"tokenizer": tokenizer}
    files = join_origins(folder, examples.parts, kept)
    return writer.finish(
        {"settings": settings, "identity": identity, "sources": examples.sources, FILES: files} | counts
    )


def left_out_of(parts: Sequence[Corpus]) -> list[Path]:
    """The files that name the rows that could not be encoded."""
    return [part.folder / LEFT_OUT for part in parts]
