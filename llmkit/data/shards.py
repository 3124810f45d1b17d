"""Canonical rows on disk, between reading and encoding: one folder for each piece of a source.

`rows.jsonl` has the rows, `index.npy` what is known of each, `left_out.jsonl` names the rows that were left out and why,
`keys-N.npy` are what the Nth of the filters that compare rows compares, and `shard.json`, written last, holds the counts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from llmkit.data.filters import Filter, build_filters, row_text
from llmkit.data.filters.comparison import Comparison
from llmkit.data.pieces import Piece
from llmkit.data.readers import Rejected, Row, Where
from llmkit.data.rows import RowFormat, convert
from llmkit.data.split import position
from llmkit.errors import ArtifactError
from llmkit.files import read_json, write_json

INDEX = np.dtype(
    [
        ("offset", "<i8"),  # bytes of rows.jsonl before the row
        ("line", "<i4"),
        ("file", "<i4"),  # number in the shard's list of files
        ("position", "<f8"),  # of the row's content, as `data.split.position` gives it
        ("place", "<f8"),  # that decides whether it is held out: its position, or that of its group
        ("stratum", "<u8"),  # rows with the same are split alike
    ]
)
LEFT_OUT = "left_out.jsonl"
SAMPLES = 20  # rows shown of those that a filter took out
_SAMPLE_CHARS = 300


@dataclass(frozen=True)
class Cleaning:
    """How the rows of one source become canonical rows."""

    kind: str
    format: RowFormat
    filters: Sequence[Any]
    weight: float = 1.0
    group: str | None = None
    stratify: str | None = None


@dataclass(frozen=True)
class CleaningTask:
    """A piece to be cleaned, and the folder for its shard."""

    piece: Piece
    cleaning: Cleaning
    folder: Path
    number: int  # of the source


@dataclass
class Tally:
    """What became of rows that were read."""

    read: int = 0
    rejected: dict[str, list[Any]] = field(default_factory=dict)  # reason -> count, the first place
    filtered: dict[str, Counter[str]] = field(default_factory=dict)  # filter -> reason -> count
    changed: dict[str, Counter[str]] = field(default_factory=dict)  # filter -> what -> count
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # filter -> rows that it took out
    left_out: list[Path] = field(default_factory=list)  # JSON Lines that name the rows that were left out

    def add(self, other: Tally) -> None:
        """Takes in the counts of other rows, which come after these."""
        self.read += other.read
        self.left_out += other.left_out
        for reason, (count, where) in other.rejected.items():
            self.rejected.setdefault(reason, [0, where])[0] += count
        for mine, theirs in ((self.filtered, other.filtered), (self.changed, other.changed)):
            for name, counts in theirs.items():
                mine.setdefault(name, Counter()).update(counts)
        for name, shown in other.samples.items():
            known = self.samples.setdefault(name, [])
            known += shown[: SAMPLES - len(known)]


class RowShard:
    """The rows of one piece. Raises ArtifactError when they are damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = read_json(folder / "shard.json")
        for name, size in self.facts["files"].items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                raise ArtifactError("kept rows are damaged", got=path, hint="the same command with --no-resume")
        self.weight: float = self.facts["weight"]
        self.index: np.ndarray = np.load(folder / "index.npy")

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowShard, (self.folder,)

    @property
    def row_bytes(self) -> np.ndarray:
        """What each row takes on disk, shape (N,)."""
        return np.diff(self.index["offset"], append=self.facts["files"]["rows.jsonl"])

    def where(self, number: int) -> Where:
        """The place of a row in its source."""
        return Where(self.facts["sources"][self.index["file"][number]], int(self.index["line"][number]))

    def rows(self, numbers: np.ndarray) -> Iterator[dict[str, Any]]:
        """Some rows, by ascending numbers."""
        with (self.folder / "rows.jsonl").open("rb") as file:
            reached = 0
            for number in numbers:
                offset = int(self.index["offset"][number])
                if offset != reached:
                    file.seek(offset)
                line = file.readline()
                reached = offset + len(line)
                yield json.loads(line)

    def keys(self, at: int) -> tuple[np.ndarray, np.ndarray]:
        """What the filter at a place in the list compares, shape (N, W), and which row each is of, -1 for one left out."""
        name = f"keys-{at}.npy"
        return np.load(self.folder / name, mmap_mode="r"), np.load(self.folder / f"rows-of-{name}")

    @property
    def tally(self) -> Tally:
        """What became of the rows of the piece."""
        filtered, changed = (
            {name: Counter(found) for name, found in self.facts[key].items()} for key in ("filtered", "changed")
        )
        read, rejected, samples = (self.facts[key] for key in ("read", "rejected", "samples"))
        return Tally(read, rejected, filtered, changed, samples, [self.folder / LEFT_OUT])


def clean(task: CleaningTask, filters: Sequence[tuple[str, Filter]] | None = None) -> Path:
    """Reads, converts and filters the rows of a piece. A pure function of the piece: what is there already stays.

    `filters` are those of the task, where they are built already (some read a model): only what they count is begun anew.
    """
    if (task.folder / "shard.json").exists():
        return task.folder
    aside = task.folder.with_name(f".{task.folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    built = build_filters(task.cleaning.filters) if filters is None else filters
    with _Writer(aside, task.piece.uri, task.cleaning, built) as writer:
        for row in task.piece.rows():
            writer.take(row)
    aside.rename(task.folder)
    return task.folder


@dataclass
class _Writer:
    folder: Path
    uri: str
    cleaning: Cleaning
    filters: Sequence[tuple[str, Filter]]
    read: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, list[Any]] = field(default_factory=dict)  # reason -> count, the first place
    filtered: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    labels: dict[str, str] = field(default_factory=dict)  # label -> the first place
    with_column: int = 0  # rows kept that have the column by which they are split
    _index: list[tuple[Any, ...]] = field(default_factory=list)
    _keys: dict[int, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))
    _rows_of_keys: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    _bytes: int = 0

    def __enter__(self) -> _Writer:
        for _, take in self.filters:
            if getattr(take, "counts", None):
                take.counts.clear()
        secret = [at for at, (_, take) in enumerate(self.filters) if getattr(take, "secret", False)]
        self._masked_from = max(secret, default=-1) + 1  # rows that were taken out before may hold what is to be masked
        self._rows = (self.folder / "rows.jsonl").open("wb")
        self._left_out: TextIO = (self.folder / LEFT_OUT).open("w", encoding="utf-8")
        return self

    def take(self, row: Row | Rejected) -> None:
        self.read += 1
        converted = row if isinstance(row, Rejected) else convert(row, self.cleaning.format)
        if isinstance(converted, Rejected):
            count = self.rejected.setdefault(converted.reason, [0, str(converted.where)])
            count[0] += 1
            self._leave_out(converted.where, None, converted.reason)
            return
        assert isinstance(row, Row)
        clean = self._filtered(converted, row.where)
        for at in self._keys:  # who reached a filter that compares, and did not get to the end
            missing = len(self._keys[at]) - len(self._rows_of_keys[at])
            self._rows_of_keys[at] += [len(self._index) if clean is not None else -1] * missing
        if clean is not None:
            self._keep(clean, row)

    def _filtered(self, row: dict[str, Any], where: Where) -> dict[str, Any] | None:
        for at, (name, take) in enumerate(self.filters):
            if isinstance(take, Comparison):
                self._keys[at].append(take.key(row))
                continue
            result = take(row)
            if isinstance(result, str):
                self.filtered[name][result] += 1
                if at >= self._masked_from and len(self.samples[name]) < SAMPLES:
                    self.samples[name].append(sample(where, result, row))
                self._leave_out(where, name, result)
                return None
            row = result
        return row

    def _keep(self, row: dict[str, Any], raw: Row) -> None:
        line = json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
        group = self.cleaning.group
        own = position(row)
        named = None if group is None else _column(raw, row, group)
        if isinstance(named, str):
            named = " ".join(named.casefold().split())
        place = own if named is None else _code(named) / 2**64  # a row without a group is one of its own
        stratum = None if self.cleaning.stratify is None else _column(raw, row, self.cleaning.stratify)
        self.with_column += named is not None or stratum is not None
        file = self.sources.setdefault(raw.where.source, len(self.sources))
        self._index.append((self._bytes, raw.where.line, file, own, place, 0 if stratum is None else _code(stratum)))
        self._rows.write(line)
        self._bytes += len(line)
        if "label" in row:
            self.labels.setdefault(row["label"], str(raw.where))

    def _leave_out(self, where: Where, name: str | None, reason: str) -> None:
        self._left_out.write(left_out_line(where, reason, name))

    def __exit__(self, kind: object, *rest: object) -> None:
        self._rows.close()
        self._left_out.close()
        if kind is not None:
            return
        np.save(self.folder / "index.npy", np.array(self._index, INDEX))
        for at, (_, take) in enumerate(self.filters):
            if isinstance(take, Comparison):
                keys = np.array(self._keys[at]) if self._keys[at] else take.none()
                np.save(self.folder / f"keys-{at}.npy", keys)
                np.save(self.folder / f"rows-of-keys-{at}.npy", np.array(self._rows_of_keys[at], np.int64))
        changed = {name: dict(take.counts) for name, take in self.filters if getattr(take, "counts", None)}
        facts = {
            "uri": self.uri,
            "read": self.read,
            "weight": self.cleaning.weight,
            "sources": list(self.sources),
            "rejected": self.rejected,
            "filtered": self.filtered,
            "changed": changed,
            "samples": self.samples,
            "labels": self.labels,
            "with_column": self.with_column,
            "files": {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())},
        }
        write_json(self.folder / "shard.json", facts)


def left_out_line(where: Where, reason: str, name: str | None = None) -> str:
    """A line of `left_out.jsonl`; without the name of a filter the row cannot be used."""
    reason = reason if name is None else f"filter {name}: {reason}"
    entry = {"source": where.source, "line": where.line, "reason": reason}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def sample(where: Where, reason: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row that a filter took out, to be looked at."""
    return {"where": str(where), "reason": reason, "text": row_text(row)[:_SAMPLE_CHARS]}


def _column(raw: Row, row: Mapping[str, Any], name: str) -> Any:
    """A column of the data, or of the canonical row; None where the row has none."""
    return raw.values.get(name, row.get(name))


def _code(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")
