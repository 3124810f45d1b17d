"""Optimizers and schedules: `build_optimizer` turns a recipe's `optimizer:` into a torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

from llmkit import catalog
from llmkit.errors import Problem, RecipeError, did_you_mean

if TYPE_CHECKING:
    import torch

WHERE = "optimizer"


def build_optimizer(
    name: str, groups: Iterable[Mapping[str, Any]], *, lr: float, options: Mapping[str, Any]
) -> torch.optim.Optimizer:
    """The optimizer that the catalogue has under `name`, with the recipe's options.

    `groups` keep their own `lr`, `weight_decay` and any further keys (`names`, `group`). All wrong options are reported
    at once. Raises RecipeError for an unknown name or option, a value of the wrong type, or one out of range.
    """
    build = catalog.resolve("optimizer", name, where=WHERE)
    checked = _checked_options(name, build, options)
    try:
        return build(groups, lr=lr, **checked)
    except ValueError as error:
        raise RecipeError(f"`{name}` refuses its options", got=str(error), where=WHERE) from None


def _checked_options(name: str, build: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, each as its annotated type (YAML reads `1e-8` as a string, and a pair as a list)."""
    import pydantic

    parameters = inspect.signature(build).parameters.values()
    known = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY and item.name != "lr"]
    annotations = get_type_hints(build)
    checked: dict[str, Any] = {}
    problems: list[Problem] = []
    for key, value in options.items():
        where = f"{WHERE}.{key}"
        if key not in known:
            hint = (
                "the rate belongs to the stage: `lr:` beside `optimizer:`" if key == "lr" else did_you_mean(key, known)
            )
            what = f"`{name}` has no option `{key}`"
            problems.append(Problem(what, got=key, expected="one of " + ", ".join(known), hint=hint, where=where))
            continue
        expected = inspect.formatannotation(annotations[key])
        try:
            if isinstance(value, bool) and annotations[key] is not bool:
                raise ValueError
            checked[key] = pydantic.TypeAdapter(annotations[key]).validate_python(value)
        except ValueError:  # pydantic.ValidationError is one
            problems.append(Problem(f"`{key}` has the wrong type", got=repr(value), expected=expected, where=where))
    if problems:
        first = problems[0]
        raise RecipeError(
            first.what, got=first.got, expected=first.expected, hint=first.hint, where=first.where, problems=problems
        )
    return checked
