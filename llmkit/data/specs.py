"""What a recipe lists by name, with or without options: each found, its options checked against their types, and built.

A name is one of the catalogue's, or the user's own code as `path.py:name`: a function, or a class with options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from llmkit.catalog import is_own_code, resolve
from llmkit.data.own_code import OwnCode
from llmkit.errors import Problem, RecipeError, did_you_mean, raise_all

_TYPE_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


def build_all(
    group: str, specs: Sequence[Any], where: str, example: str, adopt: Callable[[OwnCode], Any]
) -> list[tuple[str, Any]]:
    """The objects of a catalogue group that specs describe, in their order; `adopt` makes one of the user's own code.

    Raises RecipeError, with every mistake there is, for names, options and values that are wrong, and DataError when the
    user's own code fails.
    """
    built: list[tuple[str, Any]] = []
    problems: list[Problem] = []
    for at, spec in enumerate(specs):
        try:
            name, options = _parse(group, spec, f"{where}[{at}]", example)
            built.append((name, _build(group, name, options, f"{where}[{at}]", adopt)))
        except RecipeError as error:
            problems += error.problems
    raise_all(problems)
    return built


def files_of_specs(specs: Sequence[Any]) -> list[Path]:
    """The files whose content decides what the specs do: the user's own code, and files that an option `file` names."""
    files = []
    for spec in specs:
        name, options = (spec, None) if isinstance(spec, str) else next(iter(spec.items()))
        if is_own_code(name):
            files.append(OwnCode.path_of(name))
        elif isinstance(options, Mapping) and isinstance(options.get("file"), str):
            files.append(Path(options["file"]))
    return files


def needed(group: str, name: str, package: str) -> RecipeError:
    """The error for a package that is not installed."""
    return RecipeError(
        f"the {group} `{name}` needs a package that is not installed",
        got=f"no {package}",
        hint="pip install 'llmkit[data]'",
    )


def _a(group: str) -> str:
    return f"{'an' if group[0] in 'aeiou' else 'a'} {group}"


def _parse(group: str, spec: Any, where: str, example: str) -> tuple[str, Mapping[str, Any]]:
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
        expected = f"a name, or one name with its options: {example}"
        raise RecipeError(f"{_a(group)} is not described as {group}s are", got=spec, expected=expected, where=where)
    return name, options


def _build(group: str, name: str, options: Mapping[str, Any], where: str, adopt: Callable[[OwnCode], Any]) -> Any:
    own = OwnCode(group, name, where) if is_own_code(name) else None
    kind = resolve(group, name, where=where) if own is None else own.found
    if isinstance(kind, type):
        _check_options(kind, f"the {group} `{name}`", options, f"{where}.{name}")
    elif options:
        hint = "make it a class that takes them, with the function as its `__call__`"
        raise RecipeError(f"the {group} `{name}` is a function, which takes no options", hint=hint, where=where)
    try:
        if own is None:
            return kind(**options)
        return adopt(own.made_with(options))
    except ValueError as error:
        raise RecipeError(f"the {group} `{name}` cannot be built", got=error, where=f"{where}.{name}") from None
    except RecipeError as error:
        problems = [replace(problem, where=problem.where or f"{where}.{name}") for problem in error.problems]
        raise RecipeError(error.what, problems=problems) from None


def _check_options(kind: type, called: str, options: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(kind).parameters
    hints = _type_hints(kind)
    problems: list[Problem] = []
    for option, value in options.items():
        if option not in parameters:
            expected = "one of " + ", ".join(parameters) if parameters else "no options"
            hint = did_you_mean(str(option), parameters)
            problems.append(Problem(f"{called} has no option `{option}`", str(option), expected, hint, where))
            continue
        wanted = hints.get(option, Any)
        if not _fits(value, wanted):
            words = _words(wanted)
            what = f"the option `{option}` of {called} has the wrong {'value' if words else 'type'}"
            strange = [word for word in (value if isinstance(value, list) else [value]) if word not in words]
            hint = did_you_mean(str(strange[0]), words) if strange else None
            problems.append(Problem(what, repr(value), _described(wanted), hint, f"{where}.{option}"))
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and parameter.kind <= parameter.KEYWORD_ONLY and option not in options:
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            expected = f"{option}: {_described(hints.get(option, Any))}"
            problems.append(Problem(f"{called} needs the option `{option}`", "nothing", expected, None, where))
    raise_all(problems)


def _type_hints(kind: type) -> dict[str, Any]:
    try:
        return get_type_hints(vars(kind).get("__init__", object.__init__))
    except NameError:  # in the user's own code: a type that is not there when it runs
        return {}


def _fits(value: Any, wanted: Any) -> bool:
    """True when a value of a YAML document is of a type; a whole number is a number too, and unknown types take all."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return type(value) is str and value in inner
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, inner[0]) for item in value)
    if wanted is float:
        return type(value) in (int, float)
    plain = origin or wanted
    return type(value) is plain or plain not in (*_TYPE_WORDS, dict)


def _words(wanted: Any) -> tuple[str, ...]:
    """The words that a type allows, by themselves or in a list, if it is words that it allows."""
    if get_origin(wanted) is Literal:
        return get_args(wanted)
    if get_origin(wanted) in (list, Union, UnionType):
        return tuple(word for each in get_args(wanted) for word in _words(each))
    return ()


def _described(wanted: Any) -> str:
    origin, inner = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return "a value"
    if origin in (Union, UnionType):
        return " or ".join(map(_described, inner))
    if origin is Literal:
        return "one of " + ", ".join(inner)
    if origin is list:
        return f"a list of {_described(inner[0]).removeprefix('one of ')}"
    return _TYPE_WORDS.get(wanted, getattr(wanted, "__name__", str(wanted)))
