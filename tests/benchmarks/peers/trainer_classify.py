"""Transformers' Trainer on texts and labels, padded to the longest of the batch.

python -m tests.benchmarks.peers.trainer_classify JOB.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tests.benchmarks.peers.training import freeze, read_job, read_rows, train_and_save, training_arguments


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on a job's rows; gives what it measured and how much there was to learn from."""
    set_seed(job["seed"])
    numbers = {label: number for number, label in enumerate(job["labels"])}
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForSequenceClassification.from_pretrained(
        job["model"],
        dtype=torch.float32,
        num_labels=len(numbers),
        id2label=dict(enumerate(job["labels"])),
        label2id=numbers,
    )
    freeze(model, job)
    rows = read_rows(job["train"])
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=job["max_length"])["input_ids"]
    examples = [{"input_ids": ids, "labels": numbers[row["label"]]} for ids, row in zip(encoded, rows, strict=True)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**training_arguments(job)),
        train_dataset=Dataset.from_list(examples),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )
    measured = train_and_save(trainer, job)
    tokens = sum(map(len, encoded))
    return measured | {"tokens": tokens * job["epochs"], "supervised": len(rows) * job["epochs"]}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = run(read_job(__doc__))
    print(json.dumps(result))
