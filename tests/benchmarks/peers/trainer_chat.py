"""Transformers' Trainer on conversations: rows tokenised by hand, padded to the longest of the batch.

python -m tests.benchmarks.peers.trainer_chat JOB.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from tests.benchmarks.encode import IGNORED, encode_chat
from tests.benchmarks.peers.training import freeze, read_job, read_rows, train_and_save, training_arguments


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on a job's rows; gives what it measured and how much there was to learn from."""
    set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    freeze(model, job)
    examples = [encode_chat(tokenizer, row["messages"]) for row in read_rows(job["train"])]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**training_arguments(job)),
        train_dataset=Dataset.from_list(examples),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
    )
    measured = train_and_save(trainer, job)
    tokens = sum(len(example["input_ids"]) for example in examples)
    supervised = sum(label != IGNORED for example in examples for label in example["labels"])
    return measured | {"tokens": tokens * job["epochs"], "supervised": supervised * job["epochs"]}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = run(read_job(__doc__))
    print(json.dumps(result))
