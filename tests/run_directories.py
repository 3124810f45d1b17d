"""Run directories as llmkit leaves them, made by hand: small, and with whatever a test wants in them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

LABELS = ["cat", "dog", "emu"]
RECIPE: dict[str, Any] = {
    "name": "animals",
    "seed": 17,
    "task": "classify",
    "model": "./parent",
    "stages": ["preprocess", "freeze", "finetune", "evaluate"],
    "data": {"train": [{"uri": "rows.jsonl"}], "eval": "20%"},
    "freeze": {"blocks": "0-1", "embeddings": True},
    "finetune": {"steps": 40, "lr": 2e-4},
}
RESULTS: dict[str, Any] = {
    "model": {"accuracy": 0.9, "loss": 0.3, "f1": 0.88},
    "parent": {"accuracy": 0.4, "loss": 1.1, "f1": 0.35},
    "models": ["model", "parent"],
    "examples": 100,
    "intervals": {
        "model": {"accuracy": [0.83, 0.95], "loss": [0.2, 0.4]},
        "parent": {"accuracy": [0.31, 0.5], "loss": [1.0, 1.2]},
    },
    "differences": {
        "parent": {
            "accuracy": {"difference": 0.5, "low": 0.39, "high": 0.61, "p": 0.0005},
            "loss": {"difference": -0.8, "low": -0.95, "high": -0.65, "p": 0.0005},
            "f1": {"difference": 0.53, "low": -0.01, "high": 0.6, "p": 0.06},
        }
    },
    "reasons": {"model": {"f1": "no interval: a label has no example"}},
    "tables": {
        "model": {
            "labels": LABELS,
            "confusion_matrix": [[30, 2, 1], [0, 28, 4], [1, 2, 32]],
            "by_label": {name: {"precision": 0.9, "recall": 0.88, "f1": 0.89, "examples": 33} for name in LABELS},
            "calibration": {
                "bins": [
                    {"from": 0.4, "to": 0.5, "examples": 10, "confidence": 0.45, "accuracy": 0.5},
                    {"from": 0.9, "to": 1.0, "examples": 90, "confidence": 0.95, "accuracy": 0.8},
                ]
            },
        }
    },
    "slices": [
        {
            "by": "label",
            "value": name,
            "examples": 33,
            "model": {"accuracy": 0.9},
            "parent": {"accuracy": 0.4},
            "intervals": {"model": {"accuracy": [0.8, 0.97]}},
        }
        for name in LABELS
    ],
    "data_sets": {
        "train": {"examples": 50, "model": {"accuracy": 0.99}, "intervals": {"model": {"accuracy": [0.95, 1.0]}}}
    },
    "gaps": [
        {"kind": "over-fitting", "metric": "accuracy", "from": "train", "to": "held_out", "who": "model", "gap": -0.09}
        | {"low": -0.15, "high": -0.02}
    ],
    "benchmarks": {"model": {"hellaswag": {"acc": 0.41}}, "parent": {"hellaswag": {"acc": 0.43}}},
    "samples": [],
}
STATISTICS: dict[str, Any] = {
    "rows_read": 130,
    "rows_rejected": 2,
    "rejected": {"no text": 2},
    "rows_filtered": {"length": 8},
    "filters": {
        "length": {
            "taken_out": {"longer than 100 characters": 8},
            "changed": {},
            "samples": [{"where": "rows.jsonl:7", "reason": "longer than 100 characters", "text": "a very long row"}],
        }
    },
    "corpora": {
        name: {
            "rows": rows,
            "rows_cut": 0,
            "tokens_cut": 0,
            "examples": rows,
            "tokens": rows * 9,
            "length_percentiles": {"0": 2, "50": 8, "95": 15, "100": 16},
            "lengths_up_to": {"8": rows // 2, "16": rows - rows // 2},
            "sources": {"rows.jsonl": rows},
            "labels": {"cat": rows // 2, "dog": rows - rows // 2, "emu": 0},
        }
        for name, rows in (("train", 100), ("eval", 20))
    },
    "leaks": {"train": {"exact": 0, "near": 1, "passages": 0, "held_out_covered": 0, "held_out": 20, "shown": []}},
}


def tensors(blocks: int = 4) -> dict[str, np.ndarray]:
    """A small BERT's names with shapes."""
    found = {"bert.embeddings.word_embeddings.weight": np.zeros((20, 4), np.float32)}
    for number in range(blocks):
        found[f"bert.encoder.layer.{number}.output.dense.weight"] = np.zeros((4, 4), np.float32)
    return found | {"classifier.weight": np.zeros((3, 4), np.float32)}


def freeze_plan() -> dict[str, Any]:
    """The embeddings and blocks 0 and 1 stand still, block 2 thaws, the rest learns."""
    names = list(tensors())
    return {
        "frozen": names[:4],
        "trainable": names[4:],
        "reasons": {},
        "notes": [],
        "frozen_count": 128,
        "trainable_count": 28,
        "frozen_prefix_blocks": 2,
        "thaws": [{"at": "30%", "what": "block 2", "names": [names[3]]}],
    }


def prediction(number: int, before: float, after: float, **more: Any) -> dict[str, Any]:
    """A line of predictions.jsonl; the losses tell which examples are chosen."""
    said = {"label": "cat", "probability": 0.7}
    return {
        "example": number,
        "source": {"uri": "rows.jsonl", "file": "rows.jsonl", "line": number + 1},
        "text": f"text of {number}",
        "reference": "dog",
        "model": said | {"loss": after},
        "parent": said | {"loss": before},
    } | more


def log_lines(stage: str, steps: int) -> list[dict[str, Any]]:
    """Falling losses, with an evaluation each tenth step and one skipped step."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append(
            {
                "stage": stage,
                "step": step,
                "tokens": 90 * step,
                "loss": 2 / math.sqrt(step),
                "lr": 1e-4,
                "grad_norm": 1.5,
            }
            | {"tokens_per_second": 900.0 + step, "seconds": 0.1 * step, "peak_memory_bytes": 3 << 30}
        )
        if step % 10 == 0:
            lines.append({"stage": stage, "step": step, "tokens": 90 * step, "eval_loss": 2.2 / math.sqrt(step)})
    return [*lines, {"stage": stage, "step": 5, "event": "skipped", "why": "the loss spikes: 9.1"}]


def make_run(folder: Path, **changes: Any) -> Path:
    """A run whose stages are all done. `changes`: recipe, results, statistics, freeze, log, predictions, run; None for none."""
    parts: dict[str, Any] = {
        "recipe": RECIPE,
        "results": RESULTS,
        "statistics": STATISTICS,
        "freeze": freeze_plan(),
        "log": log_lines("finetune", 40),
        "predictions": [prediction(number, 2.0, number / 10) for number in range(40)],
        "run": {},
    } | changes
    held_out = "digest of the held-out corpus"
    done = {"state": "done", "seconds": 3.5, "metrics": {}, "facts": {}}
    trained = {"steps": 40, "train_tokens": 3600, "train_seconds": 4.0, "tokens_per_second": 900.0}
    stages: dict[str, Any] = {
        "preprocess": done | {"metrics": {"rows_read": 130}, "facts": {"corpora": {"eval": held_out}}},
        "freeze": done | {"metrics": {"frozen_parameters": 128, "trainable_parameters": 28}},
        "finetune": done
        | {"metrics": trained | {"peak_memory_bytes": 3 << 30}, "facts": {"precision": "bf16", "device": "cpu"}},
        "evaluate": done,
    }
    run = {
        "name": parts["recipe"]["name"],
        "created": "2026-01-02T03:04:05+00:00",
        "seed": 17,
        "stages": stages,
        "guesses": {"finetune.precision": {"value": "bf16", "source": "this CPU has it"}},
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "hardware": {"machine": "x86_64", "cpus": 2, "memory_bytes": 8 << 30},
        "git_commit": "0123abc",
    } | parts["run"]
    for name in ("preprocess", "freeze", "finetune/model", "evaluate"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    save_file(tensors(), folder / "finetune" / "model" / "model.safetensors")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(parts["recipe"]))
    files = {"run.json": run, "preprocess/statistics.json": parts["statistics"], "freeze/freeze.json": parts["freeze"]}
    for name, value in (files | {"evaluate/results.json": parts["results"]}).items():
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    for name, lines in (("metrics.jsonl", parts["log"]), ("evaluate/predictions.jsonl", parts["predictions"])):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
