"""How the tests score a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from llmkit.data.corpus import Corpus, CorpusWriter
from llmkit.tasks.base import Encoded, Scoring, Task

WORDS = ("apple", "river", "stone", "green", "quiet", "seven", "light", "paper", "north", "cloud", "table", "music")


def sentence(number: int) -> str:
    """A sentence of its own for each number below 1,728."""
    parts = (WORDS[number % 12], WORDS[number // 12 % 12], WORDS[number // 144 % 12])
    return f"The {parts[0]} is {parts[1]} and the {parts[2]} is near item {number}."


def scoring_of(task: Task, **changes: Any) -> Scoring:
    """fp32 on the CPU, all metrics."""
    given: dict[str, Any] = {
        "device": torch.device("cpu"),
        "precision": "fp32",
        "batch_size": 4,
        "metrics": task.metrics,
        "generate": 6,
        "max_new_tokens": 8,
        "samples": 3,
    }
    return Scoring(**(given | changes))


def corpus_of(task: Task, folder: Path, rows: Sequence[dict[str, Any]]) -> Corpus:
    """The rows, none of which may be refused, as a corpus."""
    writer = CorpusWriter(folder, task.columns)
    for encoded in task.encode(rows):
        assert isinstance(encoded, Encoded), encoded
        for example in encoded.examples:
            writer.add(example)
    return writer.finish({})


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model's folder."""
    return AutoTokenizer.from_pretrained(folder)
