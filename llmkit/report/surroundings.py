"""The sections on cost, on where it ran, and on how to do it again."""

from __future__ import annotations

import shlex
from typing import Any

from llmkit.data.personal.masking import without_secrets
from llmkit.report.blocks import Block, Code, Prose, Section, Table
from llmkit.report.record import TRAINING_STAGES, Record
from llmkit.report.training import cost_rows
from llmkit.report.words import bytes_, duration, number, plural


def cost_section(record: Record) -> Section:
    """Time, tokens and memory by stage."""
    rows = cost_rows(record)
    if not rows:
        return Section("cost", "What it took", ())
    columns = ("stage", "state", "time", "steps", "tokens", "tokens / s", "peak memory")
    table = Table(f"{duration(record.seconds)} in all", columns, rows, frozenset({1}))
    return Section("cost", "What it took", [table])


def surroundings_section(record: Record) -> Section:
    """Versions, hardware, commit and seed."""
    run = record.run
    hardware = run.get("hardware") or {}
    rows = [["started", str(run.get("created", ""))], ["seed", number(run.get("seed", record.recipe.get("seed")))]]
    if run.get("git_commit"):
        rows.append(["git commit of the folder it was started in", str(run["git_commit"])])
    if hardware:
        machine = f"{hardware.get('machine')}, {plural(int(hardware.get('cpus') or 0), 'processor core')}"
        rows.append(["machine", f"{machine}, {bytes_(hardware.get('memory_bytes'))} of memory"])
    for stage in TRAINING_STAGES:
        facts = record.facts(stage)
        if facts:
            known = [("device", facts.get("device")), ("precision", facts.get("precision"))]
            text = ", ".join(f"{key} {value}" for key, value in known if value)
            processes = plural(int(facts.get("processes") or 1), "process").replace("processs", "processes")
            rows.append([f"{stage} ran on", f"{text}, {processes}" if text else processes])
    versions = [f"{name} {version}" for name, version in (run.get("versions") or {}).items()]
    if versions:
        rows.append(["versions", ", ".join(versions)])
    return Section("environment", "Where it ran", [Table("Environment", ("what", "value"), rows, frozenset({1}))])


def recipe_section(record: Record) -> Section:
    """The command that repeats the run, what was chosen for the user, and the recipe."""
    blocks: list[Block] = []
    if record.recipe_text:
        command = f"llmkit run {shlex.quote(str(record.path / 'recipe.yaml'))} -o {shlex.quote(record.name + '-again')}"
        blocks.append(Code("The command that repeats it", command))
        blocks.append(
            Prose("The recipe in the run directory is complete: each default is written out, and the seed is in it.")
        )
    guesses: dict[str, Any] = record.run.get("guesses") or {}
    if guesses:
        rows = [
            [key, without_secrets(str(found.get("value"))), without_secrets(str(found.get("source")))]
            for key, found in guesses.items()
        ]
        blocks.append(Table("Chosen by llmkit", ("key", "value", "because of"), rows, frozenset({1, 2})))
    if record.recipe_text:
        blocks.append(Code("The recipe", record.recipe_text, folded=True))
    return Section("again", "How to do it again", blocks)
