"""From a YAML file and overrides to a Recipe; all mistakes at once, each with its line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llmkit.catalog import is_own_code
from llmkit.errors import Problem, RecipeError, UsageError, did_you_mean
from llmkit.recipe.mistakes import Keys, problems_in
from llmkit.recipe.schema import Recipe


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
    where: dict[Keys, str] = {keys: f"{path}:{line}" for keys, line in lines.items()}
    if path is not None:
        where[()] = str(path)
    for override in overrides:
        _put(values, where, override)
    return validate(values, where, path.parent if path is not None else None)


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
        why = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
        raise UsageError("the value of --set is not YAML", got=text, expected=why, where="--set") from None


def dump_recipe(recipe: Recipe) -> str:
    """A recipe with every default filled in, as YAML."""
    values = recipe.model_dump(mode="json")
    values["stages"] = list(recipe.plan)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def validate(values: Mapping[str, Any], where: Mapping[Keys, str], folder: Path | None = None) -> Recipe:
    """Checks a raw recipe; `where` says for each key where it was written, and `folder` where the recipe lies."""
    try:
        return _absolute(Recipe.model_validate(values), folder)
    except ValidationError as error:
        problems = problems_in(error.errors(include_url=False), values, where)
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
        inside = sorted(item.name for item in path.glob("*.y*ml"))
        raise UsageError(
            "the recipe is a folder, and not of a run",
            got=path,
            expected="a YAML file, or a run directory (it has a run.json)",
            hint=f"it holds {', '.join(inside[:5])}" if inside else None,
        ) from None
    except PermissionError:
        raise UsageError("the recipe cannot be read", got=path, expected="permission to read it") from None
    except UnicodeDecodeError as error:
        raise RecipeError("the recipe is not UTF-8 text", got=str(error), where=path) from None
    try:
        node = yaml.compose(text, _Loader)
        lines = _lines(node, str(path))
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(error, path) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError("the recipe is not YAML", got=str(error), where=path) from None
    if values is None:
        raise RecipeError("the recipe is empty", expected="`key: value`", where=path)
    if not isinstance(values, dict):
        got = "a list" if isinstance(values, list) else repr(values)
        raise RecipeError("the recipe is not a mapping", got=got, expected="`key: value`", where=path)
    return values, lines


def _not_yaml(error: yaml.MarkedYAMLError, path: Path) -> RecipeError:
    """What is wrong, at which line, and where that which is not finished began."""
    mark, began = error.problem_mark, error.context_mark
    hint = None
    if "\\t" in str(error.problem):
        hint = "indent with spaces: YAML allows no tabs"
    elif began is not None and mark is not None and error.context:
        hint = f"look at what begins at line {began.line + 1} ({error.context.removeprefix('while ')})"
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    return RecipeError("the recipe is not YAML", got=error.problem, hint=hint, where=where)


def _lines(node: yaml.Node | None, path: str, keys: Keys = ()) -> dict[Keys, int]:
    """The 1-based line of every key and list item; a key that stands twice is a RecipeError."""
    found: dict[Keys, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(
                    "a key is not text", got=f"a {key.id}", expected="`key: value`", where=f"{path}:{line}"
                )
            inner = (*keys, key.value)
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
    parts = override.key.split(".")
    place: Any = values
    for number, part in enumerate(parts[:-1]):
        key: Any = _index(place, part, override) if isinstance(place, list) else part
        inner = place[key] if isinstance(place, list) else place.get(key)
        if not isinstance(inner, dict | list):
            place[key] = _opened(inner, parts[: number + 1], parts[number + 1])
        place = place[key]
    last = _index(place, parts[-1], override) if isinstance(place, list) else parts[-1]
    place[last] = override.value
    keys: Keys = tuple(int(part) if part.isdigit() else part for part in parts)
    for stale in [known for known in where if known[: len(keys)] == keys]:
        del where[stale]
    where[keys] = override.flag


def _opened(value: Any, path: list[str], inner: str) -> Any:
    """A value written in short (`optimizer: sgd`, `train: rows.jsonl`) in the long form that `inner` is a part of."""
    if not isinstance(value, str):
        return {}
    if path[-1] in ("optimizer", "schedule", "adapter"):
        return {"name": value}
    if path[-1] == "train" or path[-1].isdigit() or path == ["pretrain", "data"]:
        return [{"uri": value}] if inner.isdigit() else {"uri": value}
    return {}


def _index(place: list[Any], part: str, override: Override) -> int:
    if not part.isdigit() or int(part) >= len(place):
        numbers = f"a number from 0 to {len(place) - 1}" if place else "nothing: the list is empty"
        raise UsageError(f"no item `{part}` in the list", got=override.flag, expected=numbers, where="--set")
    return int(part)


def _absolute(recipe: Recipe, folder: Path | None) -> Recipe:
    """The same recipe with paths that exist made absolute, so that the copy in the run works from any folder.

    The user's own code may also lie beside the recipe, in its folder.
    """

    def absolute(uri: str | None) -> str | None:
        return str(Path(uri).expanduser().resolve()) if uri and Path(uri).expanduser().exists() else uri

    def sources(items: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return items and tuple(item.model_copy(update={"uri": absolute(item.uri)}) for item in items)

    def specs(items: tuple[Any, ...]) -> tuple[Any, ...]:
        """The user's own code, and files among the options, of filters and augmentations."""
        found = []
        for item in items:
            name, options = (item, None) if isinstance(item, str) else next(iter(item.items()))
            if is_own_code(name):
                path, _, attribute = name.rpartition(":")
                beside = folder / path if folder is not None and not Path(path).exists() else Path(path)
                name = f"{absolute(str(beside) if beside.exists() else path)}:{attribute}"
            if options and isinstance(options.get("file"), str):
                options = {**options, "file": absolute(options["file"])}
            found.append(name if isinstance(item, str) else {name: options})
        return tuple(found)

    data = recipe.data.model_copy(
        update={
            "filters": specs(recipe.data.filters),
            "augment": specs(recipe.data.augment),
            **{key: sources(getattr(recipe.data, key)) for key in ("train", "replay", "general", "seen")},
            "eval": absolute(recipe.data.eval) if recipe.data.eval_is_uri else recipe.data.eval,
            "benchmarks": tuple(absolute(uri) for uri in recipe.data.benchmarks),
            "chat_template": absolute(recipe.data.chat_template),
        }
    )
    keys, against = recipe.evaluate, recipe.evaluate.against
    evaluate = keys.model_copy(
        update={
            "against": tuple(map(absolute, against)) if isinstance(against, tuple) else absolute(against),
            "metrics": keys.metrics if keys.metrics == "auto" else specs(keys.metrics),
            "data_sets": {name: absolute(uri) for name, uri in keys.data_sets.items()},
            "benchmarks": tuple(
                absolute(name) if name.endswith((".yaml", ".yml")) else name for name in keys.benchmarks
            ),
        }
    )
    update: dict[str, Any] = {"data": data, "model": absolute(recipe.model), "evaluate": evaluate}
    if recipe.pretrain is not None:
        update["pretrain"] = recipe.pretrain.model_copy(update={"data": sources(recipe.pretrain.data)})
    if (adapter := recipe.finetune.adapter) is not None:
        adapter = adapter.model_copy(update={"start": absolute(adapter.start)})
        update["finetune"] = recipe.finetune.model_copy(update={"adapter": adapter})
    return recipe.model_copy(update=update)
