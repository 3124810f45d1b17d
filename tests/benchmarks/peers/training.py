"""What the peers share: reading their job, the arguments that every Trainer gets, timing, and the answer."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class LoopTimer(TrainerCallback):
    """Seconds between the beginning and the end of training: without loading, tokenising and saving."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.later = 0.0  # seconds from the second epoch on
        self.epochs: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Notes when an epoch begins."""
        self.epochs.append(time.perf_counter())

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops it, when all that was asked of a GPU is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - self._started
        self.later = time.perf_counter() - self.epochs[1] if len(self.epochs) > 1 else 0.0


def read_job(description: str | None) -> dict[str, Any]:
    """The job whose file is named on the command line, as `Workload.job` makes it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("job", type=Path, help="a JSON file: see Workload.job")
    job: dict[str, Any] = json.loads(parser.parse_args().job.read_text(encoding="utf-8"))
    return job


def freeze(model: Any, job: dict[str, Any]) -> None:
    """Lets the embeddings and the leading blocks of the job stand still."""
    if not job["frozen_blocks"]:
        return
    base = model.base_model
    blocks = base.layers if hasattr(base, "layers") else base.encoder.layer
    embeddings = base.embeddings if hasattr(base, "embeddings") else base.embed_tokens
    for part in (embeddings, *blocks[: job["frozen_blocks"]]):
        part.requires_grad_(False)


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def training_arguments(job: dict[str, Any]) -> dict[str, Any]:
    """TrainingArguments of a job; what it does not name stays as the library has it."""
    return {
        "output_dir": str(Path(job["output"]).parent / "trainer"),
        "use_cpu": not torch.cuda.is_available(),  # bf16 is refused on a CPU that was not asked for
        "num_train_epochs": job["epochs"],
        "per_device_train_batch_size": job["batch_size"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": job["schedule"],
        "warmup_steps": job["warmup_steps"],
        "weight_decay": job["weight_decay"],
        "adam_beta1": job["betas"][0],
        "adam_beta2": job["betas"][1],
        "max_grad_norm": job["max_grad_norm"],
        "seed": job["seed"],
        "report_to": "none",
        "save_strategy": "no",
        **job["options"],
    }


def train_and_save(trainer: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Trains, saves, and tells how long the loop took."""
    timer = LoopTimer()
    trainer.add_callback(timer)
    found = trainer.train()
    trainer.save_model(job["output"])
    return {
        "train_seconds": timer.seconds,
        "later_seconds": timer.later,
        "steps": trainer.state.global_step,
        "train_loss": found.training_loss,
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
