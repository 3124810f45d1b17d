"""Row formats: told from the columns of the data, and turned into canonical rows of four kinds.

    text      {"text": str}
    chat      {"messages": [{"role": str, "content": str, ...}], "tools": list (optional)}
    labelled  {"text": str, "label": str}
    numbered  {"text": str, "number": float}

A function here takes the values of one row under canonical column names and returns the canonical row, or raises
ValueError with the reason why it cannot.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.catalog import resolve
from llmkit.data.readers import Rejected, Row, shown, type_name
from llmkit.data.recognise import SHAPES, recognise

CANONICAL: dict[str, str] = {name: shape.kind for name, shape in SHAPES.items()}
_DEEPEST = 32  # levels of lists and objects in a message or a tool
_ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class RowFormat:
    """Which format the rows have and where its columns are; `guessed` says why, or is None when the recipe named it.

    Labels must all be of the type `label_type`, as `type_name` calls it, unless it is None.
    """

    name: str
    columns: dict[str, str]
    guessed: str | None
    label_type: str | None = None


def choose_format(
    sample: Sequence[Row], kind: str, *, name: str | None, columns: Mapping[str, str] | None, where: str
) -> RowFormat:
    """The format of rows like the sample's, for a task that takes rows of `kind` ("text", "chat" or "labelled").

    `name` and `columns` (canonical column -> column in the data) come from the recipe and win; what they leave open is
    told from the columns on sight. Raises RecipeError when they make no sense, DataError when the data does not fit
    or could be read in more than one way.
    """
    chosen = RowFormat(*recognise(sample, kind, name=name, columns=columns, where=where))
    labels = [row.values.get(chosen.columns["label"]) for row in sample] if "label" in chosen.columns else []
    types = Counter(type_name(label) for label in labels if label is not None)
    return replace(chosen, label_type=types.most_common(1)[0][0]) if types else chosen


class _ColumnError(ValueError):
    """What is wrong with a column, kept apart from its name, so that the name in the data can be shown."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"column `{column}` {problem}")
        self.column = column
        self.problem = problem


def convert(row: Row, fmt: RowFormat) -> dict[str, Any] | Rejected:
    """The canonical row, or the reason why there is none. Columns that the format does not use are left behind."""
    values = {name: row.values[column] for name, column in fmt.columns.items() if column in row.values}
    for name in SHAPES[fmt.name].optional:  # that first stands in a row after the sample
        if name not in fmt.columns and name in row.values and name not in fmt.columns.values():
            values[name] = row.values[name]
    label = values.get("label")
    try:
        if fmt.label_type is not None and label is not None and type_name(label) != fmt.label_type:
            raise _ColumnError("label", f"is {type_name(label)} and most labels are {fmt.label_type}")
        return dict(resolve("row format", fmt.name)(values))
    except _ColumnError as error:
        return Rejected(f"column `{shown(fmt.columns.get(error.column, error.column))}` {error.problem}", row.where)
    except ValueError as error:
        return Rejected(str(error), row.where)


def _column(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise _ColumnError(name, "is missing")
    if values[name] is None:
        raise _ColumnError(name, "is null")
    return values[name]


def _text(values: Mapping[str, Any], name: str) -> str:
    """A column that must hold text that is not blank."""
    value = _column(values, name)
    if not isinstance(value, str):
        raise _ColumnError(name, f"is {type_name(value)}, not text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    _check_encodable(value, name)
    return value


def _optional_text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return "" if value is None or (isinstance(value, str) and not value.strip()) else _text(values, name)


def _check_encodable(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has a lone surrogate at character {error.start + 1}") from None


def _as_json(value: Any, what: str) -> Any:
    """A value with what JSON has no word for, such as the times that Parquet holds, as text."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{what} has a lone surrogate") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except (TypeError, ValueError):
        raise ValueError(f"{what} has a value that is not JSON") from None
    if text.count("[") + text.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
        raise ValueError(f"{what} is nested too deeply")
    return json.loads(text)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def from_text(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"text"}`, as it is."""
    return {"text": _text(values, "text")}


def from_text_label(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"text", "label"}`; a label that is a whole number or a truth value becomes text."""
    text, label = _text(values, "text"), _column(values, "label")
    if isinstance(label, float):
        if not label.is_integer():
            raise ValueError(f"label {label} is not a whole number")
        label = int(label)
    if not isinstance(label, str | int):
        raise _ColumnError("label", f"is {type_name(label)}, not a label")
    return {"text": text, "label": _text({"label": str(label)}, "label")}


def from_text_number(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"text", "number"}`; a number may be written as text."""
    text, number = _text(values, "text"), _column(values, "number")
    if isinstance(number, bool) or not isinstance(number, str | int | float):
        raise _ColumnError("number", f"is {type_name(number)}, not a number")
    try:
        found = float(number)
    except (ValueError, OverflowError):
        raise ValueError(f"number `{shown(number)}` is not a number") from None
    if not math.isfinite(found):
        raise ValueError(f"number {found} is not finite")
    return {"text": text, "number": found}


def from_prompt_completion(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"prompt", "completion"}` as a user turn and an assistant turn."""
    return _exchange("", _text(values, "prompt"), _text(values, "completion"))


def from_alpaca(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"instruction", "input" (optional), "output", "system" (optional)}`; the input follows the instruction."""
    instruction, extra = _text(values, "instruction"), _optional_text(values, "input")
    asked = f"{instruction}\n\n{extra}" if extra else instruction
    return _exchange(_optional_text(values, "system"), asked, _text(values, "output"))


def _exchange(system: str, asked: str, answer: str) -> dict[str, Any]:
    turns = [("system", system)] if system else []
    turns += [("user", asked), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def from_messages(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"messages": [{"role", "content"}], "tools" (optional)}`; other keys of a message that are not null stay."""
    items = _items(values, "messages")
    messages = [_message(item, at, "role", "content") for at, item in enumerate(items, 1)]
    return _conversation(messages, values)


def from_sharegpt(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"conversations": [{"from", "value"}], "system" and "tools" (optional)}` with the names that format has."""
    system = _optional_text(values, "system")
    items = _items(values, "conversations")
    messages = [{"role": "system", "content": system}] if system else []
    messages += [_message(item, at, "from", "value") for at, item in enumerate(items, 1)]
    return _conversation(messages, values)


def _items(values: Mapping[str, Any], name: str) -> list[Any]:
    items = _column(values, name)
    if not isinstance(items, list | tuple):
        raise _ColumnError(name, f"is {type_name(items)}, not a list")
    if not items:
        raise ValueError(f"{name} is empty")
    return list(items)


def _message(item: Any, at: int, role_key: str, content_key: str) -> dict[str, Any]:
    """One message, with its role known and its content text; `at` counts from 1."""
    if not isinstance(item, dict):
        raise ValueError(f"message {at} is {type_name(item)}, not an object")
    item = {key: value for key, value in item.items() if value is not None}  # Arrow fills the keys of others with nulls
    if role_key not in item:
        raise ValueError(f"message {at} has no `{role_key}`")
    role = _SHAREGPT_ROLES.get(shown(item[role_key])) if role_key == "from" else item[role_key]
    if role not in _ROLES:
        raise ValueError(f"unknown role `{shown(item[role_key])}`")
    if content_key not in item and not item.get("tool_calls"):
        raise ValueError(f"message {at} has no `{content_key}`")
    content = item.get(content_key, "")
    if not isinstance(content, str):
        raise ValueError(f"the content of message {at} is {type_name(content)}, not text")
    _check_encodable(content, f"message {at}")
    if not isinstance(item.get("train", True), bool):
        raise ValueError(f"`train` of message {at} is {type_name(item['train'])}, not true or false")
    if role in ("user", "assistant") and not content.strip() and not item.get("tool_calls"):
        raise ValueError(f"the {role} turn {at} is empty")
    extra = {key: value for key, value in item.items() if key not in (role_key, content_key, "role", "content")}
    return {"role": role, "content": content, **(_as_json(extra, f"message {at}") if extra else {})}


def _conversation(messages: list[dict[str, Any]], values: Mapping[str, Any]) -> dict[str, Any]:
    """The canonical row, once the turns are in an order that can be learnt from."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise ValueError("system turn is not the first")
    if "assistant" not in roles:
        raise ValueError("no assistant turn")
    if "user" not in roles[: roles.index("assistant")]:
        raise ValueError("no user turn before the first assistant turn")
    for at, role in enumerate(roles):
        if role == "tool" and (at == 0 or roles[at - 1] not in ("assistant", "tool")):
            raise ValueError(f"the tool turn {at + 1} follows no call: the turn before it is not the assistant's")
    tools = values.get("tools")
    if tools is None:
        return {"messages": messages}
    if not isinstance(tools, list):
        raise _ColumnError("tools", f"is {type_name(tools)}, not a list")
    return {"messages": messages, "tools": _as_json(tools, "tools")}
