"""Scores a model folder on held-out rows, with nothing but Transformers: one example after another, in fp32.

    python -m tests.benchmarks.judge JOB.json HELD_OUT.jsonl [MODEL_FOLDER]

Without MODEL_FOLDER it scores the model that the job starts from. Rows are encoded with that model's tokenizer, whatever
the contestant left beside its weights. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from transformers.utils import logging

from tests.benchmarks.encode import IGNORED, encode_chat

_IN_A_BLOCK = re.compile(r"\.(?:layers?|h|blocks)\.\d+\.")


@torch.inference_mode()
def chat_scores(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean loss over all supervised tokens, in nats."""
    total, count = 0.0, 0
    for row in rows:
        example = encode_chat(tokenizer, row["messages"])
        ids = torch.tensor([example["input_ids"]], device=model.device)
        labels = torch.tensor(example["labels"][1:], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return {"loss": total / count, "supervised": count}


@torch.inference_mode()
def label_scores(model: Any, tokenizer: Any, rows: list[dict[str, Any]], max_length: int) -> dict[str, Any]:
    """The mean loss over all texts, in nats, and the share that is labelled right."""
    total, right = 0.0, 0
    for row in rows:
        encoded = tokenizer(row["text"], truncation=True, max_length=max_length, return_tensors="pt").to(model.device)
        logits = model(**encoded).logits.float()
        label = torch.tensor([model.config.label2id[row["label"]]], device=model.device)
        total += F.cross_entropy(logits, label).item()
        right += int(logits.argmax() == label)
    return {"loss": total / len(rows), "accuracy": right / len(rows), "supervised": len(rows)}


def judge(job: dict[str, Any], held_out: Path, folder: str) -> dict[str, Any]:
    """Scores of a model folder, and the sizes that the arithmetic of training is counted by."""
    rows = [json.loads(line) for line in held_out.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if job["task"] == "chat":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        head = model.get_output_embeddings().weight.numel()
        return chat_scores(model, tokenizer, rows) | {"block_parameters": in_blocks(model), "output_parameters": head}
    set_seed(job["seed"])  # for the head of a model that has none yet
    numbers = {label: number for number, label in enumerate(job["labels"])}
    own = {} if folder != job["model"] else {"num_labels": len(numbers), "label2id": numbers}
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **own).to(device).eval()
    head = sum(p.numel() for name, p in model.named_parameters() if re.search(r"pooler|classifier|score", name))
    scores = label_scores(model, tokenizer, rows, job["max_length"])
    return scores | {"block_parameters": in_blocks(model), "output_parameters": head}


def in_blocks(model: Any) -> int:
    """The number of parameters in the blocks."""
    return sum(p.numel() for name, p in model.named_parameters() if _IN_A_BLOCK.search(name))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("model", nargs="?")
    given = parser.parse_args()
    logging.set_verbosity_error()
    job = json.loads(given.job.read_text(encoding="utf-8"))
    print(json.dumps(judge(job, given.held_out, given.model or job["model"])))


if __name__ == "__main__":
    main()
