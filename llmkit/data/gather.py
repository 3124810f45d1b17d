"""From sources to canonical rows on disk: read, recognise, convert, filter; all that is left out is counted and named."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from llmkit.data.filters import Filter, build_filters
from llmkit.data.filters.comparison import Comparison
from llmkit.data.pieces import Piece, pieces_of, stored_bytes
from llmkit.data.rows import RowFormat, choose_format
from llmkit.data.shards import (
    LEFT_OUT,
    SAMPLES,
    Cleaning,
    CleaningTask,
    RowShard,
    Tally,
    clean,
    left_out_line,
    sample,
)
from llmkit.data.sources import Row, Where
from llmkit.data.workers import in_order
from llmkit.errors import DataError

_SAMPLE = 20  # rows that are looked at to recognise a format
_BYTES_FOR_PROCESSES = 8 << 20  # less is done before the processes have started


@dataclass(frozen=True)
class Request:
    """One source and how it is to be read; `format` and `columns` are guessed when not given."""

    uri: str
    weight: float = 1.0
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A canonical row that is to be learnt from, where it came from, and how often it stands in an epoch."""

    row: dict[str, Any]
    where: Where
    weight: float


@dataclass(frozen=True)
class RowPart:
    """Some rows of a shard, by ascending numbers."""

    shard: RowShard
    numbers: np.ndarray
    weight: float

    def __iter__(self) -> Iterator[Kept]:
        for number, row in zip(self.numbers, self.shard.rows(self.numbers), strict=True):
            yield Kept(row, self.shard.where(number), self.weight)


@dataclass(frozen=True)
class RowSet:
    """Rows on disk, in the order of their sources."""

    parts: tuple[RowPart, ...] = ()

    def __len__(self) -> int:
        return sum(len(part.numbers) for part in self.parts)

    def __iter__(self) -> Iterator[Kept]:
        return chain.from_iterable(self.parts)

    def __add__(self, other: RowSet) -> RowSet:
        return RowSet(self.parts + other.parts)

    def column(self, name: str) -> np.ndarray:
        """What the shards' indexes say of each row, shape (N,)."""
        found = [part.shard.index[name][part.numbers] for part in self.parts]
        return np.concatenate(found) if found else np.zeros(0)

    def where(self, mask: np.ndarray) -> RowSet:
        """The rows that a mask of shape (N,) chooses."""
        ends = np.cumsum([len(part.numbers) for part in self.parts])[:-1]
        masks = np.split(mask, ends) if self.parts else []
        return RowSet(
            tuple(replace(part, numbers=part.numbers[mine]) for part, mine in zip(self.parts, masks, strict=True))
        )

    def weighed(self, factor: float) -> RowSet:
        """The same rows, each that many times as often."""
        return RowSet(tuple(replace(part, weight=part.weight * factor) for part in self.parts))

    @property
    def total_weight(self) -> float:
        """The rows of an epoch."""
        return sum(part.weight * len(part.numbers) for part in self.parts)


@dataclass
class Gathered(Tally):
    """The rows of some sources, and what became of the others."""

    rows: RowSet = RowSet()
    labels: dict[str, str] = field(default_factory=dict)  # label -> the first place
    with_column: int = 0  # rows that have the column by which they are split
    formats: dict[str, RowFormat] = field(default_factory=dict)  # by URI


def gather(
    requests: Sequence[Request],
    kind: str,
    filters: Sequence[Any],
    folder: Path,
    *,
    seen: Sequence[Request] = (),
    group: str | None = None,
    stratify: str | None = None,
    workers: int = 1,
    advance: Callable[[int], None] = lambda done: None,
) -> Gathered:
    """Reads all rows of all sources, as canonical rows of a kind (text, chat or labelled), in the order of the sources.

    Rows of `seen` sources only serve the filters that compare rows: what repeats them is taken out. Shards that are in the
    folder already are taken as they are. Raises DataError when a source cannot be read or its rows
    are of no known format.
    """
    gathered = Gathered()
    tasks: list[CleaningTask] = []
    for number, request in enumerate([*seen, *requests]):
        pieces = pieces_of(request.uri, request.format)
        chosen = format_of(request, pieces, kind)
        if chosen is not None:
            gathered.formats[request.uri] = chosen
        cleaning = Cleaning(
            kind, chosen or RowFormat("text", {}, None), tuple(filters), request.weight, group, stratify
        )
        tasks += [
            CleaningTask(piece, cleaning, folder / f"{number:03}-{at:05}", number) for at, piece in enumerate(pieces)
        ]
    big = stored_bytes([task.piece for task in tasks]) >= _BYTES_FOR_PROCESSES
    shards, known = [], 0
    read: Counter[str] = Counter()
    for task, path in in_order(_Cleaner, tasks, workers if big else 1):
        shards.append(RowShard(path))
        advance(shards[-1].facts["read"])
        read[task.piece.uri] += shards[-1].facts["read"]
        known += task.number < len(seen)
    for request in [*seen, *requests]:
        if not read[request.uri]:
            raise DataError("the data has no rows", got=request.uri, expected="at least one row", where=request.uri)
    add_up(gathered, shards[known:])
    stays = _compared(gathered, shards, known, filters, folder)
    rows = RowSet(tuple(RowPart(shard, np.arange(len(shard)), shard.weight) for shard in shards))
    gathered.rows = rows.where(stays)
    return gathered


class _Cleaner:
    """Cleans pieces, one after the other; a process builds their filters, which are the same for all, once."""

    def __init__(self) -> None:
        self._filters: list[tuple[str, Filter]] | None = None

    def __call__(self, task: CleaningTask) -> Path:
        if self._filters is None:
            self._filters = build_filters(task.cleaning.filters)
        return clean(task, self._filters)


def format_of(request: Request, pieces: Sequence[Piece], kind: str) -> RowFormat | None:
    """The format of a source, told by its first rows, or by the first good one where that comes late."""
    rows = chain.from_iterable(piece.rows() for piece in pieces)
    looked_at = list(islice(rows, _SAMPLE))
    good = [row for row in looked_at if isinstance(row, Row)] or list(
        islice((row for row in rows if isinstance(row, Row)), 1)
    )
    if not good:
        return None
    return choose_format(good, kind, name=request.format, columns=request.columns or None, where=request.uri)


def add_up(gathered: Gathered, shards: Sequence[RowShard]) -> None:
    """Takes in what shards count."""
    for shard in shards:
        gathered.add(shard.tally)
        gathered.with_column += shard.facts["with_column"]
        for label, where in shard.facts["labels"].items():
            gathered.labels.setdefault(label, where)


def _compared(
    gathered: Gathered, shards: Sequence[RowShard], known: int, filters: Sequence[Any], folder: Path
) -> np.ndarray:
    """Which rows the filters that compare rows leave, shape (N,), of all shards but the first `known` ones."""
    starts = np.cumsum([0, *(len(shard) for shard in shards)])
    stays = np.ones(starts[-1], bool)
    path = folder / f"compared-{LEFT_OUT}"
    with path.open("w", encoding="utf-8") as file:
        for at, (name, take) in enumerate(build_filters(filters)):
            if not isinstance(take, Comparison):
                continue
            keys, numbers = zip(*(shard.keys(at) for shard in shards), strict=True)
            row_of = np.concatenate(
                [np.where(n >= 0, n + start, -1) for n, start in zip(numbers, starts, strict=False)]
            )
            alive = row_of < 0
            alive[~alive] = stays[row_of[~alive]]
            repeated = take.repeats(keys, alive) >= 0
            out = row_of[repeated & (row_of >= starts[known])]
            stays[out] = False
            if len(out):
                gathered.filtered.setdefault(name, Counter())[take.reason] += len(out)
                _name_them(gathered, shards, starts, out, name, take.reason, file)
    gathered.left_out.append(path)
    stays[: starts[known]] = False
    return stays


def _name_them(
    gathered: Gathered,
    shards: Sequence[RowShard],
    starts: np.ndarray,
    out: np.ndarray,
    name: str,
    reason: str,
    file: Any,
) -> None:
    """Writes which rows a comparison took out, and keeps the first to show."""
    shown = gathered.samples.setdefault(name, [])
    mine: dict[int, list[int]] = defaultdict(list)
    for row in np.sort(out):
        mine[int(np.searchsorted(starts, row, side="right")) - 1].append(int(row))
    for place, found in mine.items():
        shard, numbers = shards[place], np.array(found) - starts[place]
        for number in numbers:
            file.write(left_out_line(shard.where(number), reason, name))
        some = numbers[: SAMPLES - len(shown)]
        shown += [sample(shard.where(number), reason, row) for number, row in zip(some, shard.rows(some), strict=True)]
