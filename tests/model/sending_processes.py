"""Run in two processes by test_sending.py: the first has a model, the other its shapes."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

from llmkit.model.loading import build_from_config, build_on_meta
from llmkit.model.sending import send_from_first

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    tie_word_embeddings=True,
)


def main(folder: Path) -> None:
    cpu = Accelerator(cpu=True)
    build = build_on_meta if cpu.process_index else lambda *given: build_from_config(*given, seed=5)
    model = build(CONFIG, "AutoModelForCausalLM")
    model.model.norm.weight.requires_grad_(False)
    model.model.scale = torch.tensor(2.5, device="meta" if cpu.process_index else "cpu")  # neither parameter nor buffer
    send_from_first(model, torch.device("cpu"))
    assert model.lm_head.weight is model.model.embed_tokens.weight, "what is tied stays tied"
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    found = {**dict(model.named_parameters()), **dict(model.named_buffers()), "scale": model.model.scale}
    with torch.no_grad():
        found["logits"] = model(torch.arange(9)[None]).logits
    save_file({name: t.detach().clone() for name, t in found.items()}, folder / f"{cpu.process_index}.safetensors")
    cpu.wait_for_everyone()
    os._exit(0)
