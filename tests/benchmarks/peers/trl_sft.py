"""TRL's SFTTrainer on conversations, with the loss on answers only.

python -m tests.benchmarks.peers.trl_sft JOB.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from tests.benchmarks.encode import IGNORED
from tests.benchmarks.peers.chat_template import TRAINING_TEMPLATE
from tests.benchmarks.peers.training import read_job, read_rows, train_and_save, training_arguments


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Trains on a job's rows; gives what it measured and how much there was to learn from."""
    set_seed(job["seed"])
    config = SFTConfig(
        max_length=job["max_length"],
        assistant_only_loss=True,
        chat_template_path=str(TRAINING_TEMPLATE),
        **training_arguments(job),
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(read_rows(job["train"])),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
    )
    measured = train_and_save(trainer, job)
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    supervised = sum(label != IGNORED for labels in trainer.train_dataset["labels"] for label in labels)
    return measured | {"tokens": tokens * job["epochs"], "supervised": supervised * job["epochs"]}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = run(read_job(__doc__))
    print(json.dumps(result))
