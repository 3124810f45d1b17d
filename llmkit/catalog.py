"""Every pluggable name, as "module:object", imported when it is first used.

A new task, optimizer, schedule, filter, metric or format is one new file and one new line here.
"""

from __future__ import annotations

import importlib
from typing import Any

from llmkit.errors import RecipeError, did_you_mean

CATALOG: dict[str, dict[str, str]] = {
    "stage": {
        "preprocess": "llmkit.stages.preprocess:STAGE",
        "pretrain": "llmkit.stages.pretrain:STAGE",
        "freeze": "llmkit.stages.freeze:STAGE",
        "finetune": "llmkit.stages.finetune:STAGE",
        "evaluate": "llmkit.stages.evaluate:STAGE",
        "export": "llmkit.stages.export:STAGE",
    },
    "task": {
        "text": "llmkit.tasks.text:TextTask",
        "chat": "llmkit.tasks.chat:ChatTask",
        "classify": "llmkit.tasks.classify:ClassifyTask",
    },
    "builtin data set": {
        "python-docs": "llmkit.data.builtin.python_docs:PythonDocs",
        "docstrings": "llmkit.data.builtin.docstrings:Docstrings",
        "docstring-packages": "llmkit.data.builtin.docstrings:DocstringPackages",
    },
    "row format": {
        "text": "llmkit.data.rows:from_text",
        "prompt_completion": "llmkit.data.rows:from_prompt_completion",
        "messages": "llmkit.data.rows:from_messages",
        "alpaca": "llmkit.data.rows:from_alpaca",
        "sharegpt": "llmkit.data.rows:from_sharegpt",
        "text_label": "llmkit.data.rows:from_text_label",
    },
    "filter": {
        "length": "llmkit.data.filters.length:LengthFilter",
        "duplicates": "llmkit.data.filters.duplicates:DuplicatesFilter",
    },
    "optimizer": {
        "adamw": "llmkit.optim.adamw:build",
        "sgd": "llmkit.optim.sgd:build",
        "adagrad": "llmkit.optim.adagrad:build",
        "rmsprop": "llmkit.optim.rmsprop:build",
        "adafactor": "llmkit.optim.adafactor:build",
        "muon": "llmkit.optim.muon:build",
        "lion": "llmkit.optim.lion:build",
        "adamw8bit": "llmkit.optim.adamw8bit:build",
    },
    "schedule": {
        "constant": "llmkit.optim.schedules:constant",
        "linear": "llmkit.optim.schedules:linear",
        "cosine": "llmkit.optim.schedules:cosine",
        "exponential": "llmkit.optim.schedules:exponential",
        "polynomial": "llmkit.optim.schedules:polynomial",
        "step": "llmkit.optim.schedules:step",
        "inverse_sqrt": "llmkit.optim.schedules:inverse_sqrt",
        "wsd": "llmkit.optim.schedules:wsd",
        "plateau": "llmkit.optim.schedules:plateau",
    },
    "export format": {
        "transformers": "llmkit.formats.transformers:write",
    },
}


def names(group: str) -> tuple[str, ...]:
    """The names that a group answers to, in catalogue order."""
    return tuple(CATALOG[group])


def resolve(group: str, name: str, *, where: str | None = None) -> Any:
    """The object behind a name; imports its module on first use.

    Raises RecipeError, with the nearest name, when the group has no such entry.
    """
    entries = CATALOG[group]
    if name not in entries:
        raise RecipeError(
            f"unknown {group} `{name}`",
            got=name,
            expected="one of " + ", ".join(entries),
            hint=did_you_mean(name, entries),
            where=where,
        )
    module, _, attribute = entries[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
