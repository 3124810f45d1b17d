"""How a contestant is set to work, and what it says of it in the same words as the others."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from tests.benchmarks.process import ROOT, Finished, run_module
from tests.benchmarks.workloads import Contestant, Workload


def train(workload: Workload, contestant: Contestant, prepared: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Lets a contestant train in `folder`, and gives what it took. Raises ProcessError.

    `model` is the folder of the trained model. `tokens` and `supervised` are what the contestant itself learnt from.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    job = workload.job(contestant, prepared, folder.resolve() / "model")
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    if contestant.module is None:
        finished, said = _llmkit(workload, job, folder)
    else:
        module = f"tests.benchmarks.peers.{contestant.module}"
        finished = run_module(module, folder.resolve() / "job.json", folder=folder)
        said = {"model": job["output"], **finished.answer}
    return said | {
        "wall_seconds": finished.seconds,
        "cpu_seconds": finished.cpu_seconds,
        "other_cpu_seconds": finished.other_cpu_seconds,
        "peak_memory_bytes": finished.peak_memory_bytes,
    }


def recipe_for(workload: Workload, job: dict[str, Any]) -> dict[str, Any]:
    """A workload as llmkit's users write it."""
    blocks = job["frozen_blocks"]
    freeze = {"freeze": {"blocks": f"0-{blocks - 1}", "embeddings": True, **job["freeze"]}} if blocks else {}
    return {
        "name": workload.name,
        "seed": job["seed"],
        "task": job["task"],
        "model": job["model"],
        "data": {"train": job["train"], "eval": None, "max_length": job["max_length"], "max_rejected": 0},
        "finetune": {
            "epochs": job["epochs"],
            "batch_size": job["batch_size"],
            "lr": job["lr"],
            "schedule": job["schedule"],
            "warmup": job["warmup_steps"],
            "optimizer": {"name": "adamw", "betas": list(job["betas"])},
            "weight_decay": job["weight_decay"],
            "max_grad_norm": job["max_grad_norm"],
            "save_every": "24h",  # nobody saves but at the end
            "log_every": 1,
            **job["options"],
        },
        **freeze,
        **job["recipe"],
        "stages": ["preprocess", *freeze, "finetune"],
    }


def _llmkit(workload: Workload, job: dict[str, Any], folder: Path) -> tuple[Finished, dict[str, Any]]:
    recipe = folder.resolve() / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_for(workload, job), sort_keys=False), encoding="utf-8")
    run = folder.resolve() / "run"
    own_cache = {"XDG_CACHE_HOME": str(folder.resolve() / "cache")}  # nothing of an earlier round is there
    finished = run_module("llmkit", "run", recipe, "--json", "-o", run, folder=folder, environment=own_cache)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    metrics = finished.answer["metrics"]["finetune"]
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in log if "tokens_per_second" in line]
    first = metrics["steps"] // workload.epochs  # the last of the first epoch
    later = sum(
        (line["tokens"] - before["tokens"]) / line["tokens_per_second"]
        for before, line in pairwise(steps)
        if line["step"] > first
    )
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))["stages"]["finetune"]["facts"]
    return finished, {
        "model": str(ROOT / finished.answer["artifacts"]["model"]),
        "train_seconds": metrics["train_seconds"],
        "later_seconds": later,
        "steps": metrics["steps"],
        "train_loss": metrics["train_loss"],
        "precision": facts["precision"],
        "peak_cuda_bytes": metrics["peak_memory_bytes"] if facts["device"] != "cpu" else None,
        "tokens": metrics["train_tokens"],
        "supervised": metrics["supervised_tokens"],
    }
