"""Writing text with a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmkit.errors import DataError
from llmkit.model.precision import choose_precision, compute_in, default_device


@torch.inference_mode()
def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    add_special_tokens: bool = False,
    on_text: Callable[[str], None] = lambda text: None,
) -> str:
    """What the model writes after a prompt, without the token that ends it; `on_text` gets it piece by piece.

    Raises DataError when the prompt alone is longer than the model can take.
    """
    from transformers import GenerationConfig, TextStreamer

    class Streamer(TextStreamer):
        """Hands finished text to `on_text`."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            on_text(text)

    device = default_device()
    precision, _ = choose_precision("auto", device)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=add_special_tokens)
    length = inputs["input_ids"].shape[1]
    reach = getattr(model.config, "max_position_embeddings", None)
    if length == 0 or (reach is not None and length >= reach):
        raise DataError("the prompt does not fit the model", got=f"{length} tokens", expected=f"1 to {reach} tokens")
    if seed is not None:
        torch.manual_seed(seed)
    sampled = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    room = max_new_tokens if reach is None else min(max_new_tokens, reach - length)
    known = model.generation_config
    config = GenerationConfig(
        max_new_tokens=room,
        eos_token_id=known.eos_token_id if known.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampled,
    )
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    compute_in(model, precision)
    tensors = {name: inputs[name].to(device) for name in ("input_ids", "attention_mask")}
    out = model.to(device).generate(**tensors, generation_config=config, streamer=streamer)
    text: str = tokenizer.decode(out[0, length:], skip_special_tokens=True)
    return text
