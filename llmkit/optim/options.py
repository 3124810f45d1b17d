"""The options of a recipe's `optimizer:` and `schedule:`: the keyword-only parameters of the function behind the name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from llmkit.errors import Problem, RecipeError, did_you_mean

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
PositiveCount = Annotated[int, Field(gt=0)]

_BESIDE = {"optimizer": ("lr", "weight_decay"), "schedule": ("warmup",)}  # keys of the stage, not of these
_TYPES = {float: "a number", int: "a whole number", bool: "true or false"}
_RANGES = {
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number from {ge:g} up",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number up to {le:g}",
    "finite_number": "a number that is finite",
}


def checked_options(kind: str, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, each as its annotated type (YAML reads `1e-8` as a string, and a pair as a list).

    `kind` is the recipe's key: `optimizer` or `schedule`. Raises RecipeError with everything that is wrong.
    """
    parameters = inspect.signature(function).parameters.values()
    known = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY and item.name not in _BESIDE[kind]]
    checked: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in options.items():
        problem = None
        if key not in known:
            problem = _unknown(kind, name, key, known)
        else:
            try:
                checked[key] = _converted(function, key, value)
            except ValueError as error:
                problem = _wrong(kind, function, key, value, error)
        problems += [problem] if problem else []
    if problems:
        first = problems[0]
        raise RecipeError(
            first.what, got=first.got, expected=first.expected, hint=first.hint, where=first.where, problems=problems
        )
    return checked


def _converted(function: Callable[..., Any], key: str, value: Any) -> Any:
    annotation = get_type_hints(function, include_extras=True)[key]
    if isinstance(value, bool) and annotation is not bool:
        raise ValueError
    return TypeAdapter(annotation).validate_python(value)


def _unknown(kind: str, name: str, key: str, known: list[str]) -> Problem:
    hint = did_you_mean(key, known)
    if key in _BESIDE[kind]:
        hint = f"it belongs to the stage: `{key}:` beside `{kind}:`"
    expected = "one of " + ", ".join(known) if known else "no option"
    return Problem(f"`{name}` has no option `{key}`", key, expected, hint, f"{kind}.{key}")


def _wrong(kind: str, function: Callable[..., Any], key: str, value: Any, error: ValueError) -> Problem:
    """What a value should have been: a choice, a range, a notation, or else another type."""
    where, got = f"{kind}.{key}", repr(value)
    found = error.errors()[0] if isinstance(error, ValidationError) else None
    context = found.get("ctx", {}) if found else {}
    if found and found["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", str(context["expected"]))
        expected = " or ".join(f"`{choice}`" for choice in choices)
        return Problem(f"`{key}` has a wrong value", got, expected, did_you_mean(str(value), choices), where)
    if found and found["type"] in _RANGES:
        return Problem(f"`{key}` is out of range", got, _RANGES[found["type"]].format(**context), None, where)
    if found and found["type"] == "value_error":
        expected = found["msg"].removeprefix("Value error, should be ")
        return Problem(f"`{key}` has a wrong value", got, expected, None, where)
    annotation = get_type_hints(function)[key]
    expected = _TYPES.get(annotation) or inspect.formatannotation(annotation)
    return Problem(f"`{key}` has the wrong type", got, expected, None, where)
