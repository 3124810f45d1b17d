"""What pydantic finds wrong in a recipe, as sentences with the place, what was expected, and a hint."""

from __future__ import annotations

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from llmkit.errors import Problem, did_you_mean
from llmkit.recipe.schema import Recipe

Keys = tuple[str | int, ...]

_SENTENCE = (
    "needs ",
    "takes ",
    "has ",
    "freezes ",
    "thaws ",
    "names ",
    "`",
)  # messages of the schema that need no "expected"
_NOT_BOTH = re.compile(r"takes `([\w.]+)` or `[\w.]+`, not both")
_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number that is finite",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "too_short": "a list of one item or more",
    "dict_type": "a mapping, `key: value`",
    "model_type": "a mapping, `key: value`",
    "invalid_key": "a key that is text",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number from {ge:g} up",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number up to {le:g}",
}


@dataclass(frozen=True)
class _Mistake:
    """One of pydantic's errors; `keys` are without its names for the branches of a union."""

    keys: Keys
    kind: str
    message: str
    input: Any
    context: Mapping[str, Any]
    in_union: bool


def problems_in(errors: Iterable[Any], values: Mapping[str, Any], where: Mapping[Keys, str]) -> list[Problem]:
    """Every mistake once, in the order found; what several branches of a union say of one value is said together."""
    found: dict[Keys, list[_Mistake]] = {}
    for error in errors:
        keys, in_union = _without_branches(error["loc"], error["type"], values)
        mistake = _Mistake(keys, error["type"], error["msg"], error["input"], error.get("ctx", {}), in_union)
        found.setdefault(keys, []).append(mistake)
    deeper = [keys for keys in found for other in found if len(other) > len(keys) and other[: len(keys)] == keys]
    places = {tuple(map(str, keys)): place for keys, place in where.items()}
    problems = []
    for keys, mistakes in found.items():
        if keys in deeper and all(mistake.in_union for mistake in mistakes):
            continue  # the value was meant for the branch that got further
        names = tuple(map(str, keys))
        place = next((places[names[:n]] for n in range(len(names), -1, -1) if names[:n] in places), None)
        problems += _problems(mistakes, place)
    return problems


def _without_branches(location: Keys, kind: str, values: Any) -> tuple[Keys, bool]:
    """The part of a location that the recipe itself has, and whether something was left out of it."""
    keys: list[str | int] = []
    place = values
    for number, key in enumerate(location):
        inside = key in place if isinstance(place, Mapping) else isinstance(place, list) and key in range(len(place))
        if inside:
            place = place[key]
        elif not (kind == "missing" and number == len(location) - 1):
            continue
        keys.append(key)
    return tuple(keys), len(keys) < len(location)


def _one_of_two(path: str, said: str) -> str | None:
    """How to take back a key of a file on the command line, where another key excludes it."""
    pair = _NOT_BOTH.match(said)
    return f"leave one of them out: --set {'.'.join(filter(None, (path, pair[1])))}=null does" if pair else None


def _problems(mistakes: list[_Mistake], place: str | None) -> list[Problem]:
    """What is wrong with one value."""
    first = mistakes[0]
    path = ".".join(map(str, first.keys))
    if first.kind == "extra_forbidden":
        known = _known_keys(first.keys[:-1])
        name = str(first.keys[-1])
        return [
            Problem(f"unknown key `{path}`", name, "one of " + ", ".join(known), did_you_mean(name, known), place),
        ]
    if first.kind == "missing":
        return [Problem(f"`{path}` is missing", expected="a value for it", where=place)]
    messages = [m.message.removeprefix("Value error, ") for m in mistakes if m.kind == "value_error"]
    message = next((text for text in messages if text.startswith(_SENTENCE)), None)  # of the branch that got furthest
    if message is not None:
        subject = f"`{path}`" if path else "the recipe"
        sentences = message.split("\n")
        return [Problem(f"{subject} {said}", hint=_one_of_two(path, said), where=place) for said in sentences]
    expected, hints = [], []
    for mistake in mistakes:
        text, hint = _expectation(mistake)
        expected.append(text)
        hints.append(hint)
    return [
        Problem(
            f"`{path}` has a wrong value",
            _shown(first.input),
            ", or ".join(dict.fromkeys(expected)),
            next((hint for hint in hints if hint), None),
            place,
        )
    ]


def _expectation(mistake: _Mistake) -> tuple[str, str | None]:
    """What should have stood there, and what may have been meant."""
    value = mistake.input
    if mistake.kind == "literal_error":
        choices = [text or number for text, number in re.findall(r"'([^']*)'|(\d+)", str(mistake.context["expected"]))]
        return " or ".join(f"`{choice}`" for choice in choices), did_you_mean(str(value), choices)
    if mistake.kind == "value_error":
        text, _, hint = mistake.message.removeprefix("Value error, ").partition("; did you mean ")
        return text.removeprefix("should be "), f"did you mean {hint}" if hint else None
    template = _EXPECTED.get(mistake.kind)
    expected = template.format(**mistake.context) if template else mistake.message
    if mistake.keys and ":" in str(mistake.keys[-1]) and value is None:
        return expected, "YAML wants a space after the colon"
    if value is None and mistake.kind in ("dict_type", "model_type"):
        return expected, "leave the key out to get its default"
    if mistake.kind == "string_type" and isinstance(value, bool | int | float):
        return expected, f"put it in quotes: {json.dumps(_shown(value))}"
    return expected, None


def _shown(value: Any) -> str | None:
    """A value as it would stand in a recipe; None for what is too large to be shown."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | BaseModel):
        return "a mapping"
    try:
        return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else repr(value)
    except TypeError:
        return repr(value)


def _known_keys(keys: Keys) -> list[str]:
    """The keys that the section at a path takes."""
    section: Any = Recipe
    for key in keys:
        if key in section.model_fields:
            section = _section_in(section.model_fields[str(key)].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The Section inside `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, tuple, typing.Annotated):
        return next((found for found in map(_section_in, typing.get_args(annotation)) if found), None)
    return None
