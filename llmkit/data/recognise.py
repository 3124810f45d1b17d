"""Which format the rows of a data set have: as the recipe says, else told from the columns of a few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmkit.catalog import names
from llmkit.data.readers import Row, shown
from llmkit.errors import DataError, RecipeError, did_you_mean

_COLUMNS_SHOWN = 20
_DIALOGUES = ("messages", "conversations", "conversation", "dialog", "dialogue")


@dataclass(frozen=True)
class Shape:
    """A format's columns: the ones it needs, the ones it may have, and what else these are called in the wild."""

    kind: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    synonyms: Mapping[str, tuple[str, ...]] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """All the columns that the format knows."""
        return self.required + self.optional

    def called(self, column: str) -> tuple[str, ...]:
        """The other names of a column."""
        return (self.synonyms or {}).get(column, ())


_TEXT = ("content", "body", "document")
SHAPES: dict[str, Shape] = {
    "text": Shape("text", ("text",), synonyms={"text": _TEXT}),
    "prompt_completion": Shape(
        "chat",
        ("prompt", "completion"),
        synonyms={"prompt": ("question", "query", "instruction"), "completion": ("answer", "response")},
    ),
    "messages": Shape("chat", ("messages",), ("tools",), {"messages": _DIALOGUES[1:]}),
    "alpaca": Shape(
        "chat",
        ("instruction", "output"),
        ("input", "system"),
        {"output": ("response",), "input": ("context",)},
    ),
    "sharegpt": Shape(
        "chat",
        ("conversations",),
        ("system", "tools"),
        {"conversations": ("messages", *_DIALOGUES[2:])},
    ),
    "text_label": Shape(
        "labelled",
        ("text", "label"),
        synonyms={"text": (*_TEXT, "sentence"), "label": ("category", "class", "target")},
    ),
    "text_number": Shape(
        "numbered",
        ("text", "number"),
        synonyms={"text": (*_TEXT, "sentence"), "number": ("score", "label", "target", "value", "rating", "stars")},
    ),
}


@dataclass(frozen=True)
class _Match:
    name: str
    columns: dict[str, str]
    row: Row
    exact: bool


def recognise(
    sample: Sequence[Row], kind: str, *, name: str | None, columns: Mapping[str, str] | None, where: str
) -> tuple[str, dict[str, str], str | None]:
    """The format's name, its columns in the data, and why it was chosen (None when `name` says it).

    Raises RecipeError when the recipe's name or columns make no sense, DataError when the data does not fit or when
    more than one reading of it would.
    """
    mapping = dict(columns or {})
    wanted = _wanted(kind, name, mapping, where)
    found = list(dict.fromkeys(column for row in sample for column in row.values))
    for column in mapping.values():
        if column not in found:
            raise DataError(
                f"the data has no column `{column}`",
                got=_ticked(found) or "no rows",
                hint=did_you_mean(column, found),
                where=where,
            )
    matches = [match for each in wanted for match in _matches(each, sample, mapping, named=name is not None)]
    chosen = _best(matches)
    if len(chosen) != 1:
        raise _undecided(chosen, kind, wanted, found, sample, where)
    match = chosen[0]
    if name is not None:
        return name, match.columns, None
    unused = [column for column in found if column not in match.columns.values()]
    reason = f"columns {_ticked(match.columns.values())} in {match.row.where}"
    return match.name, match.columns, reason + (f" (not used: {_ticked(unused)})" if unused else "")


def _wanted(kind: str, name: str | None, mapping: Mapping[str, str], where: str) -> list[str]:
    """The formats in question, after the recipe's own words were checked."""
    fitting = [each for each, shape in SHAPES.items() if shape.kind == kind]
    if name is not None:
        if name not in SHAPES:
            raise RecipeError(
                f"unknown row format `{name}`",
                got=name,
                expected="one of " + ", ".join(names("row format")),
                hint=did_you_mean(name, SHAPES),
                where=where,
            )
        if name not in fitting:
            expected = f"a format of {kind} rows: " + ", ".join(fitting)
            raise RecipeError(f"the task cannot take rows of the format `{name}`", expected=expected, where=where)
        fitting = [name]
    known = list(dict.fromkeys(column for each in fitting for column in SHAPES[each].columns))
    for column in mapping:
        if column not in known:
            raise RecipeError(
                f"`data.columns` maps an unknown column `{column}`",
                got=column,
                expected="one of " + ", ".join(known),
                hint=did_you_mean(column, known),
                where=where,
            )
    chosen = [each for each in fitting if set(mapping) <= set(SHAPES[each].columns)]
    if not chosen:
        raise RecipeError(
            "`data.columns` mixes the columns of several formats",
            got=_ticked(mapping),
            expected=_formats_with_columns(fitting),
            where=where,
        )
    return chosen


def _matches(name: str, sample: Sequence[Row], mapping: Mapping[str, str], *, named: bool) -> list[_Match]:
    """The ways to read the sample in one format: none, one, or several when two columns could be the same one."""
    for row in sample:
        places = {column: _places(row, name, column, mapping) for column in SHAPES[name].columns}
        if not all(places[column] for column in SHAPES[name].required):
            continue
        for column in SHAPES[name].optional:
            others = (_places(other, name, column, mapping) for other in sample)
            places[column] = places[column] or next(filter(None, others), [])
        dialogue = SHAPES[name].required[0]
        if dialogue in _DIALOGUES and dialogue not in mapping and not named:
            shaped = {each: _dialogue_shape(sample, each) for each in places[dialogue]}
            places[dialogue] = [each for each, shape in shaped.items() if (shape or each.lower()) in (name, dialogue)]
            if not places[dialogue]:
                return []
        if name == "alpaca" and not named and places["output"][0].lower() == "response" and not places["input"]:
            return []  # an instruction and a response are a prompt and a completion
        columns = {column: each[0] for column, each in places.items() if each}
        exact = all(columns[each].lower() == each or each in mapping for each in SHAPES[name].required)
        match = _Match(name, columns, row, exact)
        doubled = next((column for column in SHAPES[name].required if len(places[column]) > 1), None)
        if doubled is None:
            return [match]
        return [_Match(name, columns | {doubled: each}, row, exact) for each in places[doubled]]
    return []


def _places(row: Row, name: str, column: str, mapping: Mapping[str, str]) -> list[str]:
    """The columns of a row that could be a canonical one: the mapped one, else the one so called, else its synonyms."""
    if column in mapping:
        return [mapping[column]] if mapping[column] in row.values else []
    if column in row.values:
        return [column]
    lowered = {each.lower(): each for each in row.values if each not in mapping.values()}
    if column in lowered:
        return [lowered[column]]
    return [lowered[synonym] for synonym in SHAPES[name].called(column) if synonym in lowered]


def _dialogue_shape(sample: Sequence[Row], column: str) -> str | None:
    """`messages` for role/content items, `sharegpt` for from/value items, None when the sample does not tell."""
    for row in sample:
        value: Any = row.values.get(column)
        first = value[0] if isinstance(value, list) and value else None
        if isinstance(first, dict) and {"role", "content"} & set(first):
            return "messages"
        if isinstance(first, dict) and {"from", "value"} & set(first):
            return "sharegpt"
    return None


def _best(matches: Sequence[_Match]) -> list[_Match]:
    """Matches by a format's own names come before matches by synonyms, of which the one with most columns wins."""
    exact = [match for match in matches if match.exact]
    if exact:
        return exact
    most = max((len(match.columns) for match in matches), default=0)
    return [match for match in matches if len(match.columns) == most]


def _undecided(
    matches: Sequence[_Match], kind: str, wanted: Sequence[str], found: Sequence[str], sample: Sequence[Row], where: str
) -> DataError:
    if matches:
        readings = " or ".join(f"{match.name} ({_ticked(match.columns.values())})" for match in matches)
        what = f"the rows can be read in more than one way: {readings}"
    else:
        what = f"no row format fits the columns of the data (the task takes {kind} rows)"
    required = SHAPES[wanted[0]].required
    mapping = ", ".join(f"{column}: YOUR_COLUMN" for column in required)
    others = [
        each for each in SHAPES if not matches and any(match.exact for match in _matches(each, sample, {}, named=False))
    ]
    other = f"another task takes these rows, of the format `{others[0]}`; or " if others else ""
    return DataError(
        what,
        got=f"columns {_ticked(found)}" if found else "no rows",
        expected=_formats_with_columns(wanted),
        hint=f"{other}say which: `data.format: {matches[0].name if matches else wanted[0]}`, `data.columns: {{{mapping}}}`",
        where=f"{where}, {sample[0].where}" if sample else where,
    )


def _formats_with_columns(formats: Sequence[str]) -> str:
    described = []
    for name in formats:
        optional = [f"{column} (optional)" for column in SHAPES[name].optional]
        described.append(f"{name} ({', '.join([*SHAPES[name].required, *optional])})")
    return " or ".join(described)


def _ticked(columns: Any) -> str:
    named = [f"`{shown(column)}`" for column in columns]
    more = len(named) - _COLUMNS_SHOWN
    return ", ".join(named[:_COLUMNS_SHOWN]) + (f" and {more} more" if more > 0 else "")
