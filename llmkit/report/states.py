"""The states of a run's stages in words, and why those that failed did."""

from __future__ import annotations

from llmkit.data.personal.masking import without_secrets
from llmkit.report.record import Record

_ENDS = ("done", "running", "stopped", "diverged", "")
_WHY = {  # by the kind of the error, for runs that do not keep its text
    "usage": "the command is wrong",
    "recipe": "the recipe is wrong",
    "data": "the data is wrong",
    "artifact": "a model, checkpoint or artifact is missing or damaged",
    "resource": "not enough memory, disk or devices",
    "failed": "an error in llmkit itself, which is in error.log",
}


def state_of(record: Record, stage: str) -> str:
    """`done`, `running`, `stopped`, `diverged` or `failed`; nothing for a stage that says nothing."""
    state = str(record.stages[stage].get("state") or "")
    return state if state in _ENDS else "failed"


def states(record: Record) -> list[tuple[str, str]]:
    """Each stage and its state."""
    return [(name, state_of(record, name)) for name in record.stages]


def failures(record: Record) -> list[str]:
    """A sentence for each stage that failed or diverged: what happened, as far as run.json tells."""
    told = []
    for name, state in states(record):
        entry = record.stages[name]
        why = entry.get("error") or _WHY.get(str(entry.get("state")))
        if state in ("failed", "diverged") and why:
            text = without_secrets(str(why))
            told.append(f"{name} {state}: {text}" if text.endswith((".", "!", "?")) else f"{name} {state}: {text}.")
    return told
