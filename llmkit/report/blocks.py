"""What a page is made of. The templates know how each kind looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from llmkit.report.chart import Chart
from llmkit.report.words import DASH


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    kind: ClassVar[str] = "prose"
    text: str


@dataclass(frozen=True)
class Charts:
    """Drawings beside each other, as many as fit."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """Cells as texts; the first column names the rows, `words` are the other columns that are no numbers.

    `marks` gives cells a meaning: (row, column) -> `better`, `worse` or `open`.
    """

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: frozenset[int] = frozenset()
    marks: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def shown(self) -> list[int]:
        """The columns that hold anything."""
        return [
            place
            for place in range(len(self.columns))
            if not place or any(row[place] not in ("", DASH) for row in self.rows)
        ]


@dataclass(frozen=True)
class Matrix:
    """A confusion matrix: rows are what is, columns what was said; `shares` are of their row, in percent."""

    kind: ClassVar[str] = "matrix"
    caption: str
    labels: Sequence[str]
    counts: Sequence[Sequence[int]]
    shares: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Said:
    """What one model said: who, the text, and how sure or how wrong it was."""

    who: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Example:
    """A held-out example, with what each model made of it."""

    title: str
    prompt: str
    said: Sequence[Said]


@dataclass(frozen=True)
class Examples:
    """Examples that show one thing."""

    kind: ClassVar[str] = "examples"
    title: str
    examples: Sequence[Example]


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    kind: ClassVar[str] = "code"
    title: str
    text: str
    folded: bool = False


Block = Prose | Charts | Table | Matrix | Examples | Code


@dataclass(frozen=True)
class Section:
    """A part of the page; one without blocks is left out."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Figure:
    """A number that stands out."""

    name: str
    value: str
    note: str = ""
