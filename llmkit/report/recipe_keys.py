"""The keys in which recipes differ, for those who compare what came of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from llmkit.data.personal.masking import without_secrets
from llmkit.errors import LlmkitError
from llmkit.recipe.load import dump_recipe, load_recipe
from llmkit.recipe.schema import STAGES, Recipe
from llmkit.report.record import Record

_NO_KEYS = ("name",)  # of the recipe: what the columns are called by
ABSENT = object()


def differing_keys(records: Sequence[Record]) -> dict[str, tuple[Any, ...]]:
    """Of sections that not all runs have, such as `pretrain`, what differs between those that have them."""
    flat = [dict(_flat(_resolved(record))) for record in records]
    keys = dict.fromkeys(key for found in flat for key in found)
    rows = {key: tuple(found.get(key, ABSENT) for found in flat) for key in keys if key not in _NO_KEYS}
    sections = [{key.partition(".")[0] for key in found} for found in flat]

    def differs(key: str, values: tuple[Any, ...]) -> bool:
        section = key.partition(".")[0]
        own = [value for value, known in zip(values, sections, strict=True) if section in known]
        return any(value != own[0] for value in own)

    return _telling({key: values for key, values in rows.items() if differs(key, values)})


def _resolved(record: Record) -> dict[str, Any]:
    """The recipe with the defaults of today's keys, as far as it can be read today; without sections that are not used."""
    recipe: Any = record.recipe
    with suppress(LlmkitError):
        recipe = yaml.safe_load(without_secrets(dump_recipe(load_recipe(record.path / "recipe.yaml"))))
    used = set(recipe.get("stages") or STAGES)
    return {key: value for key, value in recipe.items() if value is not None and (key not in STAGES or key in used)}


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and plain values; a list of plain values is one value."""
    if isinstance(value, Mapping) and value:
        return [item for name, inner in value.items() for item in _flat(inner, f"{key}.{name}" if key else str(name))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [item for place, inner in enumerate(value) for item in _flat(inner, f"{key}.{place}")]
    return [(key, value)]


def _telling(keys: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
    """Without keys that say nothing; of a section that only some have and that is at its defaults, all of them."""
    kept = {key for key, values in keys.items() if _differ(key, values)}
    for section in keys.keys() - kept:
        inner = {key for key in keys if key.startswith(f"{section}.")}
        kept |= set() if inner & kept else inner
    return {key: values for key, values in keys.items() if key in kept}


def _differ(key: str, values: Sequence[Any]) -> bool:
    """False where a key is absent in some, and in the others empty or at the default."""
    present = [value for value in values if value is not ABSENT]
    if len(present) == len(values) or any(value != present[0] for value in present):
        return True
    return present[0] not in (None, "", [], {}) and present[0] not in _defaults(key)


def _defaults(key: str) -> list[Any]:
    """What the schema gives a dotted key that is left out; several where a section is one of several kinds."""
    *path, last = [part for part in key.split(".") if not part.isdecimal()]
    models: set[type[BaseModel]] = {Recipe}
    for part in path:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = {inner for field in fields for inner in _models(field.annotation)}
    found = [
        model.model_fields[last].get_default(call_default_factory=True)
        for model in models
        if last in model.model_fields
    ]
    return [list(value) if isinstance(value, tuple) else value for value in found]


def _models(annotation: Any) -> set[type[BaseModel]]:
    """The sections that a value of a type may be, or hold."""
    if isinstance(annotation, type) and not get_args(annotation):
        return {annotation} if issubclass(annotation, BaseModel) else set()
    return {model for argument in get_args(annotation) for model in _models(argument)}
