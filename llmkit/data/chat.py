"""Conversations as a model sees them, and which characters of them the model is to learn.

Supervised are all assistant turns, each with the token that ends it, because that is what the model must produce.
Where they stand is found in one of two ways, and never guessed:

- The template marks them with `{% generation %}`: Transformers reports their place.
- Otherwise the conversation is rendered up to each assistant turn with the generation prompt and through it; the turn is
  what the second has more than the first. A template without a generation prompt must write nothing of its own before
  the answer. A template that rewrites earlier turns (it drops old thinking, say) breaks the prefix; then every assistant
  turn becomes an example of its own, rendered as the model would see it when it answers.

What remains unclear is refused. Templates run in Transformers' sandbox.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llmkit.errors import RecipeError

Span = tuple[int, int]

_NO_END = (
    "the chat template does not end an answer with a special token, so the model could not learn to stop; "
    "name another with `data.chat_template`"
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the supervised spans of characters."""

    text: str
    spans: tuple[Span, ...]


class ChatRenderer:
    """Renders conversations with one tokenizer's template, or with `template` in its place.

    Raises RecipeError when there is no template at all.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        chosen = template or tokenizer.chat_template
        if isinstance(chosen, dict):
            chosen = chosen.get("default")
        if not chosen:
            raise RecipeError(
                "the model has no chat template",
                expected="a tokenizer with a chat template",
                hint="name a Jinja file with `data.chat_template`, or use `task: text`",
                where="data.chat_template",
            )
        self.template: str = chosen
        self.marks_answers = re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None
        added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        special = sorted({*map(str, tokenizer.all_special_tokens), *added} - {""}, key=len, reverse=True)
        token = "(?:" + "|".join(map(re.escape, special)) + ")" if special else "(?!)"
        self._closing = re.compile(rf"({token})(?:\s*{token})*\s*$")
        self._following = re.compile(rf"(\s*{token})")

    def render(self, row: dict[str, Any]) -> list[Rendered]:
        """A row with `messages` as one text with its supervised spans, or one text for each answer.

        Raises ValueError, with a reason, when the template refuses the conversation or does not show where answers are.
        """
        messages, tools = row["messages"], row.get("tools")
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("train", True)]
        if not answers:
            raise ValueError("no assistant turn to learn from")
        if self.marks_answers:
            return [self._by_marks(messages, tools)]
        whole = self._text(messages, tools)
        parts = [self._by_prefix(messages[: i + 1], tools) for i in answers]
        if all(whole.startswith(part.text) for part in parts):
            return [Rendered(whole, tuple(part.spans[0] for part in parts))]
        return parts

    def prompt(self, messages: list[dict[str, Any]], tools: Any = None) -> str:
        """What the model is given so that it answers."""
        return self._text(messages, tools, add_generation_prompt=True)

    def _by_marks(self, messages: list[dict[str, Any]], tools: Any) -> Rendered:
        """The spans that `{% generation %}` marks; a turn that is not to be learnt is left out of them."""
        text, marked = self._marked_text(messages, tools)
        spans: list[Span] = []
        for start, end in marked:
            if spans and spans[-1][1] == start:
                spans[-1] = (spans[-1][0], end)
            elif end > start:
                spans.append((start, end))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):
            raise ValueError(f"the template marks {len(spans)} answers, the conversation has {len(turns)}")
        learnt: list[Span] = []
        for (start, end), turn in zip(spans, turns, strict=True):
            closing = self._closing.search(text, start, end)
            if closing is None:
                closing = self._end_after(text, end, self._text(messages[: turn + 1], tools))
            if messages[turn].get("train", True):
                learnt.append((start, closing.end(1)))
        return Rendered(text, tuple(learnt))

    def _end_after(self, text: str, end: int, through: str) -> re.Match[str]:
        """The token that follows a marked answer at `end`, if it is also what ends `through`, which stops at that turn.

        Otherwise it belongs to the next turn. Raises ValueError when the answer has no end.
        """
        following, closing = self._following.match(text, end), self._closing.search(through)
        if following is None or closing is None or following[1].strip() != closing[1].strip():
            raise ValueError(_NO_END)
        return following

    def _by_prefix(self, messages: list[dict[str, Any]], tools: Any) -> Rendered:
        """The span of the last turn, which is the assistant's."""
        before = self._text(messages[:-1], tools, add_generation_prompt=True)
        through = self._text(messages, tools)
        if not through.startswith(before):
            raise ValueError(
                "the chat template does not show where the answer starts: what it renders before the answer is not a "
                "prefix of what it renders with it; name another with `data.chat_template`"
            )
        content = "".join(str(messages[-1].get("content") or "").split())
        added = "".join(through[len(before) :].split())
        if content not in added:
            raise ValueError("the chat template does not render the answer as it was written")
        if not added.startswith(content) and before == self._text(messages[:-1], tools):
            raise ValueError(
                "the chat template does not show where the answer starts: it has no generation prompt, and writes "
                f"`{added[: added.index(content)]}` before the answer; name another with `data.chat_template`"
            )
        closing = self._closing.search(through, len(before))
        if closing is None:
            raise ValueError(_NO_END)
        return Rendered(through[: closing.end(1)], ((len(before), closing.end(1)),))

    def _marked_text(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        """The conversation, and the characters of it that `{% generation %}` marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [_plain(messages)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template may fail in any way that Jinja can
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        return texts[0], spans[0]

    def _text(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                _plain(messages), tools=tools, chat_template=self.template, tokenize=False, **options
            )
        except Exception as error:  # a template may fail in any way that Jinja can
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        return text


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages without llmkit's own `train` key, and without keys that say nothing."""
    return [{k: v for k, v in message.items() if k != "train" and v is not None} for message in messages]
