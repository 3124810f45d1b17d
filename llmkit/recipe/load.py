"""From a YAML file and overrides to a Recipe; all mistakes at once, each with its line."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from llmkit.errors import Problem, RecipeError, UsageError, did_you_mean
from llmkit.recipe.schema import Recipe

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Override:
    """A value that the command line puts over a recipe key; `flag` is how the user wrote it."""

    key: str
    value: Any
    flag: str


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a number, and only true and false are booleans (as in YAML 1.2)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def load_recipe(path: Path | None, overrides: Iterable[Override] = ()) -> Recipe:
    """Reads a recipe file (or none) and puts overrides over it.

    Raises UsageError when the file cannot be read and RecipeError, with every mistake and its line, when it is wrong.
    """
    values, lines = ({}, {}) if path is None else _read(path)
    where = {keys: f"{path}:{line}" for keys, line in lines.items()}
    for override in overrides:
        _put(values, where, override)
    return validate(values, where)


def parse_set(text: str) -> Override:
    """`finetune.lr=1e-5` as an Override; the value is read as YAML. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(
            "--set takes KEY=VALUE", got=text, expected="for example --set finetune.lr=1e-5", where="--set"
        )
    try:
        return Override(key, yaml.load(value, _Loader), f"--set {text}")
    except yaml.YAMLError as error:
        raise UsageError("the value of --set is not YAML", got=text, expected=str(error), where="--set") from None


def dump_recipe(recipe: Recipe) -> str:
    """A recipe with every default filled in, as YAML."""
    values = recipe.model_dump(mode="json")
    values["stages"] = list(recipe.plan)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def validate(values: Mapping[str, Any], where: Mapping[Keys, str]) -> Recipe:
    """Checks a raw recipe; `where` says for each key where it was written."""
    try:
        return _absolute(Recipe.model_validate(values))
    except ValidationError as error:
        problems = [_problem(mistake, where) for mistake in error.errors(include_url=False)]
    count = len(problems)
    what = problems[0].what if count == 1 else f"the recipe has {count} mistakes"
    one = problems[0] if count == 1 else Problem(what)
    raise RecipeError(what, got=one.got, expected=one.expected, hint=one.hint, where=one.where, problems=problems)


def _read(path: Path) -> tuple[dict[str, Any], dict[Keys, int]]:
    """A YAML mapping, and the line of every key in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        raise UsageError("the recipe does not exist", got=path, expected="a YAML file", hint=near) from None
    except IsADirectoryError:
        raise UsageError("the recipe is a folder", got=path, expected="a YAML file") from None
    except PermissionError:
        raise UsageError("the recipe cannot be read", got=path, expected="permission to read it") from None
    except UnicodeDecodeError as error:
        raise RecipeError("the recipe is not UTF-8 text", got=str(error), where=path) from None
    try:
        node = yaml.compose(text, _Loader)
        lines = _lines(node, str(path))
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError("the recipe is not YAML", got=error.problem, where=where, hint=error.context) from None
    except yaml.YAMLError as error:
        raise RecipeError("the recipe is not YAML", got=str(error), where=path) from None
    if not isinstance(values, dict):
        raise RecipeError("the recipe is not a mapping", got=type(values).__name__, expected="`key: value`", where=path)
    return values, lines


def _lines(node: yaml.Node | None, path: str, keys: Keys = ()) -> dict[Keys, int]:
    """The 1-based line of every key and list item; a key that stands twice is a RecipeError."""
    found: dict[Keys, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner, line = (*keys, key.value), key.start_mark.line + 1
            if inner in found:
                name = ".".join(map(str, inner))
                raise RecipeError(
                    f"`{name}` stands twice", got=f"lines {found[inner]} and {line}", where=f"{path}:{line}"
                )
            found[inner] = line
            found |= _lines(value, path, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found[(*keys, index)] = value.start_mark.line + 1
            found |= _lines(value, path, (*keys, index))
    return found


def _put(values: dict[str, Any], where: dict[Keys, str], override: Override) -> None:
    """Writes one dotted key into a raw recipe; lists are entered by number (`data.train.0.weight`)."""
    *parents, last = override.key.split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, list):
            place = place[_index(place, part, override)]
            continue
        if not isinstance(place.get(part), dict | list):
            place[part] = {} if not isinstance(place.get(part), str) or part != "optimizer" else {"name": place[part]}
        place = place[part]
    if isinstance(place, list):
        place[_index(place, last, override)] = override.value
    else:
        place[last] = override.value
    where[tuple(int(part) if part.isdigit() else part for part in override.key.split("."))] = override.flag


def _index(place: list[Any], part: str, override: Override) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise UsageError(
            "no such item", got=override.flag, expected=f"a number from 0 to {len(place) - 1}", where="--set"
        )
    return int(part)


def _problem(mistake: Any, where: Mapping[Keys, str]) -> Problem:
    """One of pydantic's errors as a sentence with its place."""
    keys: Keys = mistake["loc"]
    place = next((where[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in where), None)
    path = ".".join(map(str, keys)) or "the recipe"
    got = repr(mistake["input"]) if not isinstance(mistake["input"], dict | BaseModel) else None
    if mistake["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        return Problem(
            f"unknown key `{path}`",
            got=str(keys[-1]),
            expected="one of " + ", ".join(known),
            hint=did_you_mean(str(keys[-1]), known),
            where=place,
        )
    if mistake["type"] == "missing":
        return Problem(f"`{path}` is missing", expected="a value for it", where=place)
    message = mistake["msg"].removeprefix("Value error, ")
    message, _, hint = message.partition("; did you mean")
    message = message[:1].lower() + message[1:]
    if message.startswith(("needs", "takes", "has", "freezes", "`")):
        return Problem(f"`{path}` {message}" if keys else f"the recipe {message}", where=place)
    message = message.removeprefix("input ")
    return Problem(
        f"`{path}` has a wrong value",
        got=got,
        expected=message,
        hint=f"did you mean{hint}" if hint else None,
        where=place,
    )


def _known_keys(keys: Keys) -> list[str]:
    """The keys that the section at a path takes."""
    section: Any = Recipe
    for key in keys:
        if isinstance(key, int) or not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        section = _section_in(section.model_fields[key].annotation) or section
    return list(section.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The Section inside `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, tuple, typing.Annotated):
        return next((found for found in map(_section_in, typing.get_args(annotation)) if found), None)
    return None


def _absolute(recipe: Recipe) -> Recipe:
    """The same recipe with paths that exist made absolute, so that the copy in the run works from any folder."""

    def absolute(uri: str | None) -> str | None:
        return str(Path(uri).expanduser().resolve()) if uri and Path(uri).expanduser().exists() else uri

    def sources(items: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return items and tuple(item.model_copy(update={"uri": absolute(item.uri)}) for item in items)

    data = recipe.data.model_copy(
        update={
            "train": sources(recipe.data.train),
            "eval": absolute(recipe.data.eval),
            "chat_template": absolute(recipe.data.chat_template),
        }
    )
    update: dict[str, Any] = {"data": data, "model": absolute(recipe.model)}
    if recipe.pretrain is not None:
        update["pretrain"] = recipe.pretrain.model_copy(update={"data": sources(recipe.pretrain.data)})
    return recipe.model_copy(update=update)
