"""Parts of held-out data: by label, source, length, or a column of the rows, which is read back from where they lie."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llmkit.data.corpus import Corpus
from llmkit.data.sources import Row, read_rows
from llmkit.errors import RecipeError, did_you_mean
from llmkit.recipe.schema import Recipe
from llmkit.stages.origins import Origins, origins_of
from llmkit.stages.scoring import DataSet

BINS = 4  # of lengths, and of numbers of which there are more than SLICES
SLICES = 20  # of one column; rarer values go together
_REST, _NONE = "(other values)", "(none)"


def slices_of(recipe: Recipe, data: DataSet) -> dict[str, list[str]]:
    """For each of `evaluate.slices` the value of every example of a data set. Raises RecipeError for unknown columns."""
    return {name: _values(recipe, data, name) for name in recipe.evaluate.slices}


def grouped(recipe: Recipe, data: DataSet) -> DataSet:
    """A data set whose rows with the same value of `data.group` are drawn together; as it is where no row has one."""
    origins, name = origins_of(data.corpus), recipe.data.group
    if name is None or origins is None:
        return data
    everything = np.arange(len(data.corpus))
    found, _ = _read_back(recipe, data.corpus, origins, everything, name)
    if not found:
        return data
    places = _places(origins, everything)
    values = [("group", str(found[place])) if found.get(place) is not None else ("row", *place) for place in places]
    number_of = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return replace(data, together=np.array([number_of[value] for value in values], np.int64))


def parts_of(values: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Each value with the places that have it, in the order of the values."""
    found = np.array(values, dtype=object)
    for value in sorted(set(values), key=_order):
        yield value, np.flatnonzero(found == value)


def _values(recipe: Recipe, data: DataSet, name: str) -> list[str]:
    corpus, numbers = data.corpus, data.numbers
    if name == "label" and "label" in corpus.columns and data.task.settings.labels:
        return [data.task.settings.labels[number] for number in corpus.values("label")[numbers]]
    if name == "source":
        return [str(corpus.meta["sources"][number]) for number in corpus.values("source")[numbers]]
    if name == "length":
        lengths = corpus.lengths(data.task.size_column)[numbers]
        return _binned(lengths.tolist(), " tokens")
    return _as_slices(_column(recipe, corpus, numbers, name))


def _as_slices(found: list[Any]) -> list[str]:
    """Values of a column as names of slices; nothing and NaN are the same."""
    values: list[Any] = [None if isinstance(value, float) and math.isnan(value) else value for value in found]
    texts = [_NONE if value is None else str(value) for value in values]
    known = [value for value in values if value is not None]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        finite = [place for place, value in enumerate(values) if value is not None and math.isfinite(value)]
        if len({values[place] for place in finite}) > SLICES:
            for place, text in zip(finite, _binned([values[place] for place in finite], ""), strict=True):
                texts[place] = text
            return texts
    often = {value for value, _ in Counter(texts).most_common(SLICES)}
    return [text if text in often else _REST for text in texts]


def _binned(found: Sequence[float], unit: str) -> list[str]:
    """The quarter of each number, named by the least and the largest in it; equal numbers are in the same."""
    values = np.array(found)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1]))
    places = np.searchsorted(edges, values, side="left")
    names = {
        int(place): f"{_number(values[places == place].min())}-{_number(values[places == place].max())}{unit}"
        for place in np.unique(places)
    }
    return [names[int(place)] for place in places]


def _number(value: float) -> str:
    return f"{value:g}"


def _order(value: str) -> tuple[int, float, str]:
    """Bins by their first number, then other values by their letters, what is rare or missing last."""
    if value in (_REST, _NONE):
        return 2, 0.0, value
    first = value.split("-")[0] if not value.startswith("-") else ""
    try:
        return 0, float(first), value
    except ValueError:
        return 1, 0.0, value


def _column(recipe: Recipe, corpus: Corpus, numbers: np.ndarray, name: str) -> list[Any]:
    """A column of the rows that the examples come from. Raises RecipeError when no row has it."""
    origins = origins_of(corpus)
    if origins is None:
        raise RecipeError(
            "the corpus does not say which rows its examples come from",
            got=f"evaluate.slices: {name}",
            hint="it was made by an earlier llmkit: run `llmkit preprocess --no-resume` with this recipe",
            where="evaluate.slices",
        )
    found, columns = _read_back(recipe, corpus, origins, numbers, name)
    if not any(key in found for key in _places(origins, numbers)):
        expected = ["label", "source", "length", *(column for column in columns if column not in ("label", "source"))]
        raise RecipeError(
            f"no held-out row has the column `{name}`",
            got=name,
            expected="one of " + ", ".join(expected),
            hint=did_you_mean(name, expected),
            where="evaluate.slices",
        )
    return [found.get(key) for key in _places(origins, numbers)]


def _places(origins: Origins, numbers: np.ndarray) -> list[tuple[str, int]]:
    return [
        (origins.files[file], line)
        for file, line in zip(origins.file[numbers].tolist(), origins.line[numbers].tolist(), strict=True)
    ]


def _read_back(
    recipe: Recipe, corpus: Corpus, origins: Origins, numbers: np.ndarray, name: str
) -> tuple[dict[tuple[str, int], Any], list[str]]:
    """The column's values by place, and the names of all columns; preprocess has seen that the rows are the same."""
    wanted, found, columns = set(_places(origins, numbers)), {}, dict[str, None]()
    for uri in corpus.meta["sources"]:
        for row in read_rows(uri, recipe.data.format):
            if isinstance(row, Row) and (key := (row.where.source, row.where.line)) in wanted:
                columns |= dict.fromkeys(row.values)
                if name in row.values:
                    found[key] = row.values[name]
    return found, list(columns)
