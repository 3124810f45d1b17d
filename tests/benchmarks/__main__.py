"""Compares llmkit with its peers, in turn, on the same rows with the same settings.

Each contestant trains in a process of its own, in the order A B C A B C ..., and one independent judge scores what it
leaves. Results are printed and written as JSON; nothing waits for a network.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks import evaluation, preprocessing, tables
from tests.benchmarks.contestants import train
from tests.benchmarks.process import ROOT, ProcessError, run_module
from tests.benchmarks.results import FORMULA, Record, add_rates, medians, mismatches, ratios
from tests.benchmarks.workloads import WORKLOADS, Contestant, Workload


class Benchmark:
    """One measurement of some workloads; `results` is what is written, after every run."""

    def __init__(self, output: Path, rounds: int, examples: int | None) -> None:
        self.output = output
        self.folder = output.parent / f"{output.stem}-work"
        self.rounds = rounds
        self.examples = examples
        self.console = Console(stderr=True)
        self.failures: list[str] = []
        machine = run_module("tests.benchmarks.machine", folder=self.folder / "machine").answer
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.results: Record = {"started": started, "rounds": rounds, "machine": machine, "formula": FORMULA}
        self.results |= {"failures": self.failures, "workloads": {}}

    def measure(self, workload: Workload, contestants: Sequence[Contestant]) -> None:
        """Prepares a workload, lets everybody train in turn, and keeps what was found."""
        folder = self.folder / workload.name
        extra = [] if self.examples is None else ["--examples", self.examples]
        arguments = (workload.name, folder.resolve(), *extra)
        prepared = run_module("tests.benchmarks.prepare", *arguments, folder=folder / "prepare").answer
        job = folder / "job.json"
        job.write_text(json.dumps(workload.job(contestants[0], prepared, folder / "model")), encoding="utf-8")
        before = self._judge(job, prepared, folder / "before")
        rows = {key: value for key, value in prepared.items() if isinstance(value, int)}
        result: Record = {"settings": _settings(workload), "rows": rows, "before": before, "runs": []}
        self.results["workloads"][workload.name] = result
        for number in range(1, self.rounds + 1):
            for contestant in contestants:
                self.console.print(f"{workload.name}, round {number} of {self.rounds}: {contestant.name}")
                try:
                    run = self._run(workload, contestant, number, prepared)
                except ProcessError as error:
                    tables.show_mistakes(self.console, "failed", [str(error)])
                    self.failures.append(f"{workload.name}, round {number}: {contestant.name} failed")
                    self.write()
                    continue
                add_rates(run, rows, workload.epochs, before, self.results["machine"]["bf16_peak_flops"])
                result["runs"].append(run)
                said = f"  {run['tokens_per_second']:.1f} tokens/s, {run['wall_seconds']:.1f} s, loss {run['loss']:.4f}"
                self.console.print(said, highlight=False)
                self._summarise(workload, result)

    def _run(self, workload: Workload, contestant: Contestant, number: int, prepared: Record) -> Record:
        folder = self.folder / workload.name / f"{number}-{contestant.name}"
        run: Record = {"contestant": contestant.name, "round": number, "options": contestant.options}
        run |= train(workload, contestant, prepared, folder)
        scores = self._judge(folder / "job.json", prepared, folder / "judge", run["model"])
        shutil.rmtree(run.pop("model"))
        return run | {key: scores[key] for key in ("loss", "accuracy") if key in scores}

    def _judge(self, job: Path, prepared: Record, folder: Path, *model: str) -> Record:
        arguments = (job.resolve(), prepared["held_out"], *model)
        return run_module("tests.benchmarks.judge", *arguments, folder=folder).answer

    def _summarise(self, workload: Workload, result: Record) -> None:
        """Brings medians and ratios up to date, and writes everything."""
        runs = result["runs"]
        result["mismatches"] = mismatches(runs, result["rows"], workload.epochs, workload.batch_size)
        result["medians"], result["ratios"] = medians(runs), ratios(runs)
        self.write()

    def write(self) -> None:
        """Keeps what was found so far."""
        self.output.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def show(self) -> bool:
        """Prints the tables; True when everything ran and everybody learnt from the same."""
        console = Console()
        tables.show_machine(console, self.results["machine"])
        wrong = list(self.failures)
        for name, result in self.results["workloads"].items():
            if result["runs"]:
                console.print()
                tables.show_workload(console, name, result)
                wrong += [f"{name}: {line}" for line in result["mismatches"]]
        console.print()
        tables.show_legend(console)
        console.print(f"written to {self.output}", highlight=False, soft_wrap=True)
        if wrong:
            tables.show_mistakes(self.console, "these figures must not be compared", wrong)
        return not wrong


def _settings(workload: Workload) -> dict[str, Any]:
    """What all contestants were given, without paths and without who they are."""
    keys = ("model", "max_length", "epochs", "batch_size", "lr", "schedule", "warmup_steps", "weight_decay", "betas")
    return {key: getattr(workload, key) for key in (*keys, "max_grad_norm", "seed")}


def _chosen(workload: Workload, names: Sequence[str]) -> list[Contestant]:
    """The contestants of a workload that were named, or those that always take part."""
    return [each for each in workload.contestants if (each.name in names if names else not each.asked_for)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    everybody = {each.name: None for workload in WORKLOADS.values() for each in workload.contestants}
    only_asked = ", ".join(each.name for w in WORKLOADS.values() for each in w.contestants if each.asked_for)
    parser.add_argument(
        "--only",
        choices=(*WORKLOADS, "preprocessing", "evaluation"),
        action="append",
        help="a workload; may be repeated",
    )
    parser.add_argument(
        "--contestants", default="", help=f"names, with commas between; {only_asked} take part only when named"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often everybody trains (default 3)")
    parser.add_argument("--examples", type=int, help="rows to train on, to try the benchmark")
    parser.add_argument("--output", type=Path, help="the JSON file (default runs/bench/TIME/results.json)")
    given = parser.parse_args()
    given.contestants = [name for name in given.contestants.split(",") if name]
    if unknown := sorted(set(given.contestants) - set(everybody)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(everybody)}")
    return given


def main() -> None:
    """The command line. Exits with 1 when a contestant failed or learnt from something else than the others."""
    given = _arguments()
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    output = given.output or ROOT / "runs" / "bench" / stamp / "results.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        benchmark = Benchmark(output, given.rounds, given.examples)
        for name in (name for name in given.only or WORKLOADS if name in WORKLOADS):
            workload = WORKLOADS[name] if given.examples is None else WORKLOADS[name].with_examples(given.examples)
            if contestants := _chosen(workload, given.contestants):
                benchmark.measure(workload, contestants)
        if given.only is None or "preprocessing" in given.only:
            small = given.examples is not None
            size = (20.0, 20_000) if small else (preprocessing.MEGABYTES, preprocessing.DOCUMENTS)
            benchmark.results["preprocessing"] = preprocessing.report(*size, given.rounds)
            benchmark.write()
        if given.only is None or "evaluation" in given.only:
            examples = given.examples or evaluation.EXAMPLES
            benchmark.results["evaluation"] = evaluation.report(examples, evaluation.BATCH, given.rounds)
            benchmark.write()
    except ProcessError as error:  # what all contestants need; theirs are kept and reported
        sys.exit(str(error))
    sys.exit(0 if benchmark.show() else 1)


if __name__ == "__main__":
    main()
