"""Conversations as token ids and labels, as one writes it by hand: the reference that every contestant is held to."""

from __future__ import annotations

from typing import Any

IGNORED = -100  # the label of a token that is not supervised


def encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> dict[str, list[int]]:
    """`input_ids` of a whole conversation, and `labels` on its last answer and the token that ends it.

    Raises ValueError when the template does not render the prompt as the beginning of the conversation.
    """
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    if whole[: len(prompt)] != prompt:
        raise ValueError("the prompt is not the beginning of the conversation")
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    labels = [IGNORED] * len(prompt) + whole[len(prompt) : end] + [IGNORED] * (len(whole) - end)
    return {"input_ids": whole, "labels": labels}
