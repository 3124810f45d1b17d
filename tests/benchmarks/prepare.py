"""Writes what all contestants of a workload start from, and counts it.

    python -m tests.benchmarks.prepare WORKLOAD FOLDER [--examples N]

Prints one JSON line: the model folder, the files of rows, and the tokens that one tokenizer finds in them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llmkit.model.loading import load_tokenizer
from llmkit.model.location import locate
from tests.benchmarks.encode import IGNORED, encode_chat
from tests.benchmarks.peers.chat_template import check_training_template
from tests.benchmarks.rows import Rows, chat_rows, package_rows
from tests.benchmarks.workloads import WORKLOADS, Workload


def prepare(workload: Workload, folder: Path) -> dict[str, Any]:
    """The files of a workload, and how much there is to learn from in one epoch."""
    model = locate(workload.model)
    tokenizer = load_tokenizer(model)
    sizes = (workload.train_examples, workload.held_out_examples, workload.max_length)
    if workload.task == "chat":
        check_training_template(tokenizer)
        train, held_out = chat_rows(tokenizer, *sizes)
    else:
        train, held_out = package_rows(tokenizer, *sizes)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": _write(folder / "train.jsonl", train), "held_out": _write(folder / "held-out.jsonl", held_out)}
    labels = sorted({row["label"] for row in train}) if workload.task == "classify" else []
    counts = count_rows(workload, tokenizer, train)
    return {"model": str(model), "labels": labels, **files, "held_out_examples": len(held_out), **counts}


def count_rows(workload: Workload, tokenizer: Any, rows: Rows) -> dict[str, int]:
    """Tokens and what is supervised, tokens of answers or texts, in some rows."""
    if workload.task == "classify":
        texts = [row["text"] for row in rows]
        encoded = tokenizer(texts, truncation=True, max_length=workload.max_length)["input_ids"]
        return {"examples": len(rows), "tokens": sum(map(len, encoded)), "supervised": len(rows)}
    examples = [encode_chat(tokenizer, row["messages"]) for row in rows]
    return {
        "examples": len(rows),
        "tokens": sum(len(example["input_ids"]) for example in examples),
        "supervised": sum(label != IGNORED for example in examples for label in example["labels"]),
    }


def _write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path.resolve())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int)
    given = parser.parse_args()
    workload = WORKLOADS[given.workload]
    if given.examples:
        workload = workload.with_examples(given.examples)
    print(json.dumps(prepare(workload, given.folder)))


if __name__ == "__main__":
    main()
