"""Filters: one canonical row in, the row or the reason for taking it out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llmkit.data.filters.comparison import Comparison
from llmkit.data.own_code import OwnCode
from llmkit.data.specs import build_all, files_of_specs

__all__ = ["Comparison", "Filter", "build_filters", "clean_texts", "filter_files", "map_texts", "row_text"]

Spec = str | Mapping[str, Mapping[str, Any]]
EMPTY = "no text is left"
_PLAIN = {"role", "content"}
_EXAMPLE = "{length: {min_chars: 20}}"
_ANSWERS = "the row, True to keep it, False to take it out, or the reason as text"


class Filter(Protocol):
    """What a filter is: called with each canonical row; its answer depends on that row alone.

    `counts`, on filters that change rows, is what they changed so far, by kind; `secret`, on those that look for what
    must not be seen, says that rows they took out are not to be shown. Reasons say nothing of the row's content.
    """

    counts: Counter[str]
    secret: bool = False

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        """The row (the same or a changed copy), or the reason for taking it out."""
        ...


def build_filters(specs: Sequence[Spec]) -> list[tuple[str, Filter]]:
    """The filters that a recipe names, in its order: `duplicates`, or `{length: {min_chars: 20}}` with options.

    `path.py:name` is the user's own: a function, or a class with options, whose answer is the row, True to keep it, False
    to take it out, or the reason for that. Nothing else is an answer, None neither: most often it is a forgotten `return`.

    Raises RecipeError, with every mistake there is, for names, options and values that no filter takes.
    """
    return build_all("filter", specs, "data.filters", _EXAMPLE, _OwnFilter)


def filter_files(specs: Sequence[Spec]) -> list[Path]:
    """The files whose content decides what the filters do: the user's own code, and lists of words."""
    return files_of_specs(specs)


def row_text(row: Mapping[str, Any]) -> str:
    """The text of a canonical row of any kind: its text, or the contents of its messages on lines of their own."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return str(row["text"])


def map_texts(row: dict[str, Any], change: Callable[[str], str], deep: bool = False) -> dict[str, Any]:
    """The row with its text, or each message's content, changed: the same row when nothing changes, else a copy.

    With `deep`, all other strings of the messages (calls of tools, thoughts) and of the tools too, but for roles.
    """
    if "messages" not in row:
        text = change(row["text"])
        return row if text == row["text"] else {**row, "text": text}
    messages = [{**message, "content": change(message["content"])} for message in row["messages"]]
    changed = {**row, "messages": messages}
    if deep:
        rest = [{key: _mapped(message[key], change) for key in message.keys() - _PLAIN} for message in row["messages"]]
        changed["messages"] = [{**message, **more} for message, more in zip(messages, rest, strict=True)]
        changed |= {key: _mapped(row[key], change) for key in row.keys() & {"tools"}}
    return row if changed == row else changed


def clean_texts(row: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any] | str:
    """`map_texts`, or a reason when a text that is needed is blank then."""
    changed = map_texts(row, change)
    if changed is row:
        return row
    if "messages" not in changed:
        return changed if changed["text"].strip() else EMPTY
    turns = (turn for turn in changed["messages"] if turn["role"] in ("user", "assistant"))
    return EMPTY if any(not turn["content"].strip() and not turn.get("tool_calls") for turn in turns) else changed


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


class _OwnFilter:
    """A filter of the user's own."""

    def __init__(self, code: OwnCode) -> None:
        self._code = code
        self.secret = bool(getattr(code.found, "secret", False))
        counts = getattr(code.found, "counts", None)
        self.counts: Counter[str] = counts if isinstance(counts, Counter) else Counter()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any] | str:
        answer = self._code(row)
        if answer is True:
            return row
        if answer is False:
            return "rejected"
        if isinstance(answer, str):
            if not answer.strip():
                raise self._code.wrong("a reason without words", _ANSWERS)
            return answer
        return self._code.checked_row(answer, row, _ANSWERS)
