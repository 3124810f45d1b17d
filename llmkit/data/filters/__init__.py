"""Filters: one canonical row in, the row or the reason for taking it out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Protocol, get_args, get_type_hints

from llmkit.catalog import resolve
from llmkit.errors import Problem, RecipeError, did_you_mean

_WHERE = "data.filters"
_TYPE_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


class Filter(Protocol):
    """What a filter is: called with each canonical row in turn; it may remember what it saw."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row (the same or changed), or the reason for taking it out."""
        ...


def row_text(row: Mapping[str, Any]) -> str:
    """The text of a canonical row of any kind: its text, or the contents of its messages on lines of their own."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return str(row["text"])


def build_filters(specs: Sequence[str | Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, Filter]]:
    """The filters that a recipe names, in its order: `duplicates`, or `{length: {min_chars: 20}}` with options.

    Raises RecipeError, with every mistake there is, for names, options and values that no filter takes.
    """
    built: list[tuple[str, Filter]] = []
    problems: list[Problem] = []
    for at, spec in enumerate(specs):
        try:
            built.append(_build(spec, f"{_WHERE}[{at}]"))
        except RecipeError as error:
            problems += error.problems
    if problems:
        first = problems[0]
        raise RecipeError(
            first.what, got=first.got, expected=first.expected, hint=first.hint, where=first.where, problems=problems
        )
    return built


def _build(spec: Any, where: str) -> tuple[str, Filter]:
    name: Any
    options: Any
    if isinstance(spec, str):
        name, options = spec, {}
    elif isinstance(spec, Mapping) and len(spec) == 1:
        name, options = next(iter(spec.items()))
        options = {} if options is None else options
    else:
        name, options = "", None
    if not isinstance(name, str) or not isinstance(options, Mapping):
        expected = "a name, or one name with its options: {length: {min_chars: 20}}"
        raise RecipeError("a filter is not described as filters are", got=spec, expected=expected, where=where)
    kind = resolve("filter", name, where=where)
    _check_options(kind, name, options, f"{where}.{name}")
    try:
        return name, kind(**options)
    except ValueError as error:
        raise RecipeError(f"the filter `{name}` cannot be built", got=error, where=f"{where}.{name}") from None


def _check_options(kind: type, name: str, options: Mapping[str, Any], where: str) -> None:
    known = list(inspect.signature(kind).parameters)
    hints = get_type_hints(vars(kind).get("__init__"))
    problems: list[Problem] = []
    for option, value in options.items():
        if option not in known:
            expected = "one of " + ", ".join(known) if known else "no options"
            hint = did_you_mean(str(option), known)
            problems.append(
                Problem(f"the filter `{name}` has no option `{option}`", str(option), expected, hint, where)
            )
            continue
        types = get_args(hints[option]) or (hints[option],)
        if type(value) not in types:
            expected = " or ".join(_TYPE_WORDS.get(each, each.__name__) for each in types)
            what = f"the option `{option}` of the filter `{name}` has the wrong type"
            problems.append(Problem(what, repr(value), expected, None, f"{where}.{option}"))
    if problems:
        raise RecipeError(problems[0].what, problems=problems)
