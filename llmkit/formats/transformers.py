"""A Transformers folder: safetensors, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmkit.errors import ArtifactError
from llmkit.model.loading import load_config, load_model, load_tokenizer

_INPUTS = ("input_ids", "attention_mask")


def write(
    source: Path, target: Path, auto_class: str, dtype: str, probe: dict[str, torch.Tensor] | None
) -> dict[str, Any]:
    """Writes a model and compares the logits of what was written with those of the model in memory, which must be equal.

    `probe` is a batch of (B, T) token ids and their mask, or None for made-up ids. Raises ArtifactError, leaving
    nothing in place, when the logits differ.
    """
    model = load_model(source, auto_class, dtype=dtype).model.eval()
    model.save_pretrained(target)
    load_tokenizer(source).save_pretrained(target)
    inputs = {name: probe[name] for name in _INPUTS} if probe else _made_up(load_config(source))
    again = load_model(target, auto_class, dtype=dtype).model.eval()
    before, after = _logits(model, inputs), _logits(again, inputs)
    if not torch.equal(before, after):
        raise ArtifactError(
            "the exported model does not answer as the model does",
            got=f"logits that differ by up to {(before - after).abs().max().item():g}",
            expected="equal logits",
            where=target,
        )
    return {
        "dtype": dtype,
        "compared_logits": before.numel(),
        "largest_difference": (before - after).abs().max().item(),
        "bytes": sum(path.stat().st_size for path in target.iterdir()),
    }


@torch.inference_mode()
def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the tokens that are not padding, (N, V), or of the texts, (B, C)."""
    logits: torch.Tensor = model(**inputs).logits.float()
    return logits[inputs["attention_mask"].bool()] if logits.ndim == 3 else logits


def _made_up(config: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
