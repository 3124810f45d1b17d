"""Row formats: told from the columns or named by the recipe, and turned into canonical rows or refused with a reason."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from llmkit.catalog import CATALOG, resolve
from llmkit.data.recognise import SHAPES
from llmkit.data.rows import CANONICAL, RowFormat, choose_format, convert
from llmkit.data.sources import Rejected, Row, Where
from llmkit.errors import DataError, LlmkitError, RecipeError

USER = {"role": "user", "content": "hi"}
BOT = {"role": "assistant", "content": "yes"}
CHAT = [USER, BOT]
SHARE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(each, Where("rows.jsonl", at)) for at, each in enumerate(values, 1)]


def choose(
    *values: dict[str, Any], kind: str, name: str | None = None, columns: dict[str, str] | None = None
) -> RowFormat:
    return choose_format(rows(*values), kind, name=name, columns=columns, where="data.train")


def canonical(name: str, values: dict[str, Any]) -> Any:
    fmt = RowFormat(name, {column: column for column in SHAPES[name].columns}, None)
    result = convert(rows(values)[0], fmt)
    return result.reason if isinstance(result, Rejected) else result


def test_every_format_of_the_catalogue_has_its_kind() -> None:
    assert list(CANONICAL) == list(CATALOG["row format"])
    assert set(CANONICAL.values()) == {"text", "chat", "labelled", "numbered"}
    assert all(callable(resolve("row format", name)) for name in CANONICAL)


@pytest.mark.parametrize(
    ("kind", "values", "name", "columns"),
    [
        ("text", {"text": "a"}, "text", {"text": "text"}),
        ("text", {"Body": "a", "id": 1}, "text", {"text": "Body"}),
        ("text", {"content": "a"}, "text", {"text": "content"}),
        ("text", {"document": "a", "prompt": "b"}, "text", {"text": "document"}),
        ("text", {"text": "a", "content": "b"}, "text", {"text": "text"}),
        ("labelled", {"text": "a", "label": 1}, "text_label", {"text": "text", "label": "label"}),
        ("labelled", {"Content": "a", "Category": 1}, "text_label", {"text": "Content", "label": "Category"}),
        ("labelled", {"text": "a", "class": 1}, "text_label", {"text": "text", "label": "class"}),
        ("labelled", {"text": "a", "target": 1}, "text_label", {"text": "text", "label": "target"}),
        (
            "chat",
            {"prompt": "a", "completion": "b"},
            "prompt_completion",
            {"prompt": "prompt", "completion": "completion"},
        ),
        ("chat", {"question": "a", "answer": "b"}, "prompt_completion", {"prompt": "question", "completion": "answer"}),
        ("chat", {"Query": "a", "Response": "b"}, "prompt_completion", {"prompt": "Query", "completion": "Response"}),
        (
            "chat",
            {"instruction": "a", "response": "b"},
            "prompt_completion",
            {"prompt": "instruction", "completion": "response"},
        ),
        ("chat", {"instruction": "a", "output": "b"}, "alpaca", {"instruction": "instruction", "output": "output"}),
        (
            "chat",
            {"instruction": "a", "context": "c", "response": "b"},
            "alpaca",
            {"instruction": "instruction", "output": "response", "input": "context"},
        ),
        ("chat", {"messages": CHAT}, "messages", {"messages": "messages"}),
        ("chat", {"messages": CHAT, "tools": None}, "messages", {"messages": "messages", "tools": "tools"}),
        ("chat", {"conversation": CHAT}, "messages", {"messages": "conversation"}),
        ("chat", {"dialog": CHAT}, "messages", {"messages": "dialog"}),
        ("chat", {"conversations": CHAT}, "messages", {"messages": "conversations"}),
        ("chat", {"conversations": SHARE}, "sharegpt", {"conversations": "conversations"}),
        ("chat", {"messages": SHARE}, "sharegpt", {"conversations": "messages"}),
        ("chat", {"Dialog": SHARE}, "sharegpt", {"conversations": "Dialog"}),
        ("chat", {"messages": []}, "messages", {"messages": "messages"}),
        ("chat", {"conversations": None}, "sharegpt", {"conversations": "conversations"}),
    ],
)
def test_formats_are_told_on_sight(kind: str, values: dict[str, Any], name: str, columns: dict[str, str]) -> None:
    fmt = choose(values, kind=kind)
    assert (fmt.name, fmt.columns) == (name, columns)
    assert CANONICAL[fmt.name] == kind
    assert fmt.guessed is not None
    assert "rows.jsonl:1" in fmt.guessed


def test_what_was_guessed_says_why() -> None:
    plain = choose({"prompt": "a", "completion": "b"}, kind="chat")
    assert plain.guessed == "columns `prompt`, `completion` in rows.jsonl:1"
    more = choose({"id": 1}, {"id": 2, "prompt": "a", "completion": "b"}, kind="chat")
    assert more.guessed == "columns `prompt`, `completion` in rows.jsonl:2 (not used: `id`)"


@pytest.mark.parametrize(
    ("kind", "values", "in_what"),
    [
        ("text", {"prompt": "a", "completion": "b"}, "no row format fits"),
        ("text", {"content": "a", "body": "b"}, "more than one way"),
        ("chat", {"text": "a"}, "no row format fits"),
        ("chat", {"prompt": "a", "completion": "b", "messages": CHAT}, "more than one way"),
        ("chat", {"question": "a", "query": "b", "answer": "c"}, "more than one way"),
        ("chat", {"conversation": CHAT, "dialog": CHAT}, "more than one way"),
        ("chat", {"conversation": "text"}, "no row format fits"),
        ("labelled", {"text": "a"}, "no row format fits"),
        ("labelled", {"text": "a", "category": 1, "class": 2}, "more than one way"),
    ],
)
def test_no_match_and_more_than_one_are_errors_that_say_how_to_map(
    kind: str, values: dict[str, Any], in_what: str
) -> None:
    with pytest.raises(DataError, match=in_what) as caught:
        choose(values, kind=kind)
    error = caught.value
    assert all(f"`{column}`" in str(error.got) for column in values)
    assert all(
        column in str(error.expected) for column in SHAPES[next(k for k in CANONICAL if CANONICAL[k] == kind)].required
    )
    assert "`data.format: " in str(error.hint)
    assert "`data.columns: {" in str(error.hint)
    assert error.where == "data.train, rows.jsonl:1"


def test_rows_of_another_task_are_named() -> None:
    with pytest.raises(DataError, match="no row format fits") as caught:
        choose({"messages": CHAT}, kind="labelled")
    assert str(caught.value.hint).startswith("another task takes these rows, of the format `messages`; or say which: ")


def test_rows_of_two_formats_are_ambiguous() -> None:
    with pytest.raises(DataError, match=r"prompt_completion .* or messages"):
        choose({"prompt": "a", "completion": "b"}, {"messages": CHAT}, kind="chat")


def test_no_rows_are_an_error() -> None:
    with pytest.raises(DataError) as caught:
        choose(kind="chat")
    assert (caught.value.got, caught.value.where) == ("no rows", "data.train")


def test_the_recipe_wins() -> None:
    both = {"prompt": "a", "completion": "b", "messages": CHAT, "Ask": "c", "Tell": "d"}
    named = choose(both, kind="chat", name="messages")
    assert named == RowFormat("messages", {"messages": "messages"}, None)
    mapped = choose(both, kind="chat", columns={"prompt": "Ask", "completion": "Tell"})
    assert (mapped.name, mapped.columns) == ("prompt_completion", {"prompt": "Ask", "completion": "Tell"})
    one = choose(both, kind="chat", name="prompt_completion", columns={"completion": "Tell"})
    assert one == RowFormat("prompt_completion", {"prompt": "prompt", "completion": "Tell"}, None)
    share = choose({"messages": CHAT}, kind="chat", name="sharegpt", columns={"conversations": "messages"})
    assert share.columns == {"conversations": "messages"}


@pytest.mark.parametrize(
    ("options", "kind_of_error", "in_what", "hint"),
    [
        ({"name": "mesages"}, RecipeError, "unknown row format", "did you mean `messages`?"),
        ({"name": "text"}, RecipeError, "cannot take rows of the format `text`", None),
        ({"columns": {"promt": "a"}}, RecipeError, "unknown column `promt`", "did you mean `prompt`?"),
        ({"name": "alpaca", "columns": {"prompt": "a"}}, RecipeError, "unknown column `prompt`", None),
        ({"columns": {"prompt": "prompt", "output": "answer"}}, RecipeError, "mixes the columns", None),
        ({"columns": {"prompt": "promp"}}, DataError, "no column `promp`", "did you mean `prompt`?"),
        ({"name": "alpaca"}, DataError, "no row format fits", None),
    ],
)
def test_a_recipe_that_makes_no_sense(
    options: dict[str, Any], kind_of_error: type[LlmkitError], in_what: str, hint: str | None
) -> None:
    with pytest.raises(kind_of_error, match=in_what) as caught:
        choose({"prompt": "a", "answer": "b"}, kind="chat", **options)
    if hint:
        assert caught.value.hint == hint
    assert str(caught.value.where).startswith("data.train")


SYSTEM = {"role": "system", "content": "be nice"}


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("text", {"text": " a\n"}, {"text": " a\n"}),
        ("text_label", {"text": "a", "label": "x"}, {"text": "a", "label": "x"}),
        ("text_label", {"text": "a", "label": 3}, {"text": "a", "label": "3"}),
        ("text_label", {"text": "a", "label": 3.0}, {"text": "a", "label": "3"}),
        ("text_label", {"text": "a", "label": True}, {"text": "a", "label": "True"}),
        ("prompt_completion", {"prompt": "hi", "completion": "yes"}, {"messages": CHAT}),
        ("alpaca", {"instruction": "hi", "output": "yes"}, {"messages": CHAT}),
        ("alpaca", {"instruction": "hi", "input": " ", "output": "yes", "system": None}, {"messages": CHAT}),
        (
            "alpaca",
            {"instruction": "hi", "input": "you", "output": "yes", "system": "be nice"},
            {"messages": [SYSTEM, {"role": "user", "content": "hi\n\nyou"}, BOT]},
        ),
        ("messages", {"messages": [SYSTEM, *CHAT, *CHAT]}, {"messages": [SYSTEM, *CHAT, *CHAT]}),
        ("messages", {"messages": CHAT, "tools": [{"name": "t"}]}, {"messages": CHAT, "tools": [{"name": "t"}]}),
        ("messages", {"messages": CHAT, "tools": None}, {"messages": CHAT}),
        (
            "messages",
            {"messages": [{**USER, "name": None}, {**BOT, "train": False}]},
            {"messages": [USER, {**BOT, "train": False}]},
        ),
        (
            "messages",
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        ),
        ("sharegpt", {"conversations": SHARE}, {"messages": CHAT}),
        ("sharegpt", {"conversations": SHARE, "system": "be nice"}, {"messages": [SYSTEM, *CHAT]}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "be nice"},
                    {"from": "user", "value": "hi"},
                    {"from": "assistant", "value": "yes"},
                    {"from": "tool", "value": "42"},
                    {"from": "assistant", "value": "yes", "weight": 1},
                ]
            },
            {"messages": [SYSTEM, *CHAT, {"role": "tool", "content": "42"}, {**BOT, "weight": 1}]},
        ),
    ],
)
def test_canonical_rows(name: str, values: dict[str, Any], expected: dict[str, Any]) -> None:
    assert canonical(name, values) == expected


def turn(role: Any, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("name", "values", "reason"),
    [
        ("text", {}, "column `text` is missing"),
        ("text", {"text": None}, "column `text` is null"),
        ("text", {"text": ["a"]}, "column `text` is a list, not text"),
        ("text", {"text": {}}, "column `text` is an object, not text"),
        ("text", {"text": 3}, "column `text` is a number, not text"),
        ("text", {"text": False}, "column `text` is true or false, not text"),
        ("text", {"text": b"a"}, "column `text` is bytes, not text"),
        ("text", {"text": " \n"}, "text is empty"),
        ("text", {"text": "abc\ud800"}, "text has a lone surrogate at character 4"),
        ("text_label", {"text": "a"}, "column `label` is missing"),
        ("text_label", {"text": "", "label": 1}, "text is empty"),
        ("text_label", {"text": "a", "label": None}, "column `label` is null"),
        ("text_label", {"text": "a", "label": [1]}, "column `label` is a list, not a label"),
        ("text_label", {"text": "a", "label": 0.5}, "label 0.5 is not a whole number"),
        ("text_label", {"text": "a", "label": float("nan")}, "label nan is not a whole number"),
        ("text_label", {"text": "a", "label": ""}, "label is empty"),
        ("text_label", {"text": "a", "label": "\udc00"}, "label has a lone surrogate at character 1"),
        ("prompt_completion", {"prompt": "a"}, "column `completion` is missing"),
        ("prompt_completion", {"prompt": "", "completion": "b"}, "prompt is empty"),
        ("prompt_completion", {"prompt": "a", "completion": ""}, "completion is empty"),
        ("prompt_completion", {"prompt": CHAT, "completion": "b"}, "column `prompt` is a list, not text"),
        ("alpaca", {"instruction": "a", "output": "b", "input": 3}, "column `input` is a number, not text"),
        ("alpaca", {"instruction": "", "output": "b"}, "instruction is empty"),
        ("alpaca", {"instruction": "a", "output": ""}, "output is empty"),
        ("messages", {"messages": "hi"}, "column `messages` is text, not a list"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": [USER, "x"]}, "message 2 is text, not an object"),
        ("messages", {"messages": [USER, BOT, {"content": "a"}]}, "message 3 has no `role`"),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "message 2 has no `content`"),
        ("messages", {"messages": [USER, turn("assistant", None)]}, "message 2 has no `content`"),
        ("messages", {"messages": [USER, turn("assistant", [])]}, "the content of message 2 is a list, not text"),
        ("messages", {"messages": [turn("foo", "a"), BOT]}, "unknown role `foo`"),
        ("messages", {"messages": [turn(["user"], "a"), BOT]}, "unknown role `['user']`"),
        ("messages", {"messages": [USER]}, "no assistant turn"),
        ("messages", {"messages": [USER, turn("assistant", " ")]}, "the assistant turn 2 is empty"),
        ("messages", {"messages": [turn("user", ""), BOT]}, "the user turn 1 is empty"),
        ("messages", {"messages": [USER, SYSTEM, BOT]}, "system turn is not the first"),
        ("messages", {"messages": [SYSTEM, BOT, *CHAT]}, "no user turn before the first assistant turn"),
        ("messages", {"messages": [turn("user", "\ud83d"), BOT]}, "message 1 has a lone surrogate at character 1"),
        ("messages", {"messages": [USER, {**BOT, "why": "\ud83d"}]}, "message 2 has a lone surrogate"),
        ("messages", {"messages": [USER, {**BOT, "train": 1}]}, "`train` of message 2 is a number, not true or false"),
        (
            "messages",
            {"messages": [USER, turn("tool", "42"), BOT]},
            "the tool turn 2 follows no call: the turn before it is not the assistant's",
        ),
        ("messages", {"messages": CHAT, "tools": "[]"}, "column `tools` is text, not a list"),
        ("messages", {"messages": CHAT, "tools": ["\ud83d"]}, "tools has a lone surrogate"),
        ("sharegpt", {"conversations": [{"value": "a"}]}, "message 1 has no `from`"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "message 1 has no `value`"),
        ("sharegpt", {"conversations": [{"from": "bot", "value": "a"}]}, "unknown role `bot`"),
        ("sharegpt", {"conversations": [{"from": ["x"], "value": "a"}]}, "unknown role `['x']`"),
        ("sharegpt", {"conversations": SHARE[::-1]}, "no user turn before the first assistant turn"),
    ],
)
def test_reasons_are_exact(name: str, values: dict[str, Any], reason: str) -> None:
    assert canonical(name, values) == reason


def test_a_reason_names_the_column_of_the_data_and_the_place() -> None:
    fmt = RowFormat("text", {"text": "Body"}, None)
    (row,) = rows({"Body": 3, "text": "not this one"})
    assert convert(row, fmt) == Rejected("column `Body` is a number, not text", Where("rows.jsonl", 1))


def test_labels_are_of_the_type_that_most_of_the_sample_has() -> None:
    fmt = choose(*({"text": "a", "label": label} for label in ("x", 1, None, 2.0)), kind="labelled")
    results = [convert(row, fmt) for row in rows(*({"text": "a", "label": each} for each in (3, 4.0, "3", True)))]
    assert results[:2] == [{"text": "a", "label": "3"}, {"text": "a", "label": "4"}]
    assert [each.reason for each in results[2:] if isinstance(each, Rejected)] == [
        "column `label` is text and most labels are a number",
        "column `label` is true or false and most labels are a number",
    ]


@pytest.mark.parametrize("sample", [1, 2])
def test_an_optional_column_may_come_late(sample: int) -> None:
    tools = [{"name": "t"}]
    late = rows({"messages": CHAT}, {"messages": CHAT, "tools": tools})
    fmt = choose_format(late[:sample], "chat", name=None, columns=None, where="data.train")
    assert [convert(row, fmt) for row in late] == [{"messages": CHAT}, {"messages": CHAT, "tools": tools}]


def test_what_json_has_no_word_for_becomes_text() -> None:
    sent = datetime(2024, 5, 6, tzinfo=UTC)
    expected = {"messages": [USER, {**BOT, "sent": str(sent), "cost": "1.5"}]}
    assert canonical("messages", {"messages": [USER, {**BOT, "sent": sent, "cost": Decimal("1.5")}]}) == expected


def test_converting_leaves_the_row_alone() -> None:
    values = {"messages": [{**USER, "x": None}, BOT]}
    before = repr(values)
    canonical("messages", values)
    assert repr(values) == before
