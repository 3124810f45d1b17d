"""Tokenising a JSON Lines file without llmkit.

python -m tests.benchmarks.peers.tokenize bare|map TOKENIZER FILE FOLDER

`bare` is the limit: `encode_batch` of the `tokenizers` library on all cores, over text that is in memory already. `map` is
`datasets.map` with as many processes as cores, saved to disk. Prints one JSON line with the seconds of that alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

_AT_ONCE = 1000


def bare(tokenizer: str, file: Path) -> float:
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    seconds = 0.0
    with file.open(encoding="utf-8") as lines:
        texts: list[str] = []
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == _AT_ONCE:
                seconds += _timed(fast, texts)
                texts = []
        return seconds + (_timed(fast, texts) if texts else 0.0)


def _timed(fast: object, texts: list[str]) -> float:
    started = time.perf_counter()
    fast.encode_batch(texts)  # type: ignore[attr-defined]
    return time.perf_counter() - started


def mapped(tokenizer: str, file: Path, folder: Path) -> float:
    import datasets
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tokenizer)
    started = time.perf_counter()
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    encoded = rows.map(
        lambda batch: {"input_ids": fast(batch["text"])["input_ids"]},
        batched=True,
        num_proc=len(os.sched_getaffinity(0)),
        remove_columns=["text"],
    )
    encoded.save_to_disk(str(folder))
    return time.perf_counter() - started


def main() -> None:
    how, tokenizer, file, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    seconds = bare(tokenizer, file) if how == "bare" else mapped(tokenizer, file, folder)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
