"""From sources to canonical rows: read, recognise, convert, filter; everything that is left out is counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from llmkit.data.filters import Filter
from llmkit.data.rows import RowFormat, choose_format, convert
from llmkit.data.sources import Rejected, Row, Where, read_rows

_SAMPLE = 20  # rows that are looked at to recognise a format


@dataclass(frozen=True)
class Request:
    """One source and how it is to be read; `format` and `columns` are guessed when not given."""

    uri: str
    weight: float = 1.0
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Kept:
    """A canonical row that is to be learnt from, and where it came from."""

    row: dict[str, Any]
    where: Where
    weight: float


@dataclass
class Gathered:
    """The rows of some sources; `read` counts all, `rejected` names those that cannot be used."""

    rows: list[Kept] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    filtered: list[Rejected] = field(default_factory=list)
    taken_by_filter: Counter[str] = field(default_factory=Counter)
    formats: dict[str, RowFormat] = field(default_factory=dict)
    read: int = 0


def gather(
    requests: Sequence[Request],
    kind: str,
    filters: Sequence[tuple[str, Filter]],
    advance: Callable[[int], None] = lambda done: None,
) -> Gathered:
    """Reads all rows of all sources, as canonical rows of a kind (text, chat or labelled), in the order of the sources.

    Raises DataError when a source cannot be read or its rows are of no known format.
    """
    gathered = Gathered()
    for request in requests:
        for row in _rows(request, kind, gathered):
            gathered.read += 1
            advance(1)
            if isinstance(row, Rejected):
                gathered.rejected.append(row)
                continue
            _filter(row, filters, gathered)
    return gathered


def _rows(request: Request, kind: str, gathered: Gathered) -> Iterator[Kept | Rejected]:
    rows = read_rows(request.uri)
    sample = list(islice(rows, _SAMPLE))
    good = [row for row in sample if isinstance(row, Row)]
    if good:
        chosen = choose_format(good, kind, name=request.format, columns=request.columns or None, where=request.uri)
        gathered.formats[request.uri] = chosen
    for row in chain(sample, rows):
        if isinstance(row, Rejected):
            yield row
            continue
        if not good:  # the first good row comes late: recognise the format by it
            good = [row]
            chosen = choose_format(good, kind, name=request.format, columns=request.columns or None, where=request.uri)
            gathered.formats[request.uri] = chosen
        converted = convert(row, chosen)
        yield converted if isinstance(converted, Rejected) else Kept(converted, row.where, request.weight)


def _filter(kept: Kept, filters: Sequence[tuple[str, Filter]], gathered: Gathered) -> None:
    row = kept.row
    for name, take in filters:
        result = take(row)
        if isinstance(result, str):
            gathered.filtered.append(Rejected(f"filter {name}: {result}", kept.where))
            gathered.taken_by_filter[name] += 1
            return
        row = result
    gathered.rows.append(Kept(row, kept.where, kept.weight))
