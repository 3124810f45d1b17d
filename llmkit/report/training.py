"""The sections on training: curves, events, and what of the model stood still."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmkit.report import figures
from llmkit.report.blocks import Block, Charts, Prose, Section, Table
from llmkit.report.chart import Chart
from llmkit.report.model_parts import (
    Adapters,
    model_parts,
    parameter_sizes,
    planned_adapters,
    read_adapters,
    runs_of,
)
from llmkit.report.record import TRAINING_STAGES, Record, reading
from llmkit.report.states import state_of
from llmkit.report.words import DASH, duration, number, plural, short_count

_EVENTS = 50  # that are shown


def training_section(record: Record) -> Section:
    """Curves of each stage that trains, and what happened on the way."""
    blocks: list[Block] = []
    stages = [stage for stage in TRAINING_STAGES if stage in record.log.curves]
    for stage in stages:
        charts = stage_charts(record, stage, of_many=len(stages) > 1)
        if charts:
            blocks.append(Charts(charts))
    blocks += _events(record)
    if record.log.unreadable:
        blocks.append(Prose(f"{plural(record.log.unreadable, 'line')} of metrics.jsonl could not be read."))
    return Section("training", "Training", blocks)


def stage_charts(record: Record, stage: str, *, of_many: bool) -> list[Chart]:
    """Loss, learning rate, gradient norm, speed and memory over the steps."""
    found = record.log.curves[stage]
    name = f"{stage.capitalize()}: " if of_many else ""
    losses = {title: found[key] for key, title in (("loss", "training"), ("eval_loss", "held out")) if key in found}
    charts = []
    if losses:
        charts.append(figures.curves(f"{stage}-loss", _title(name, "loss"), losses, ""))
    for key, title, unit in (
        ("lr", "learning rate", ""),
        ("grad_norm", "gradient norm", ""),
        ("tokens_per_second", "speed", "tokens / s"),
        ("peak_memory_bytes", "peak memory", "bytes"),
    ):
        if key in found:
            charts.append(figures.curves(f"{stage}-{key}", _title(name, title), {title: found[key]}, unit))
    return charts


def _title(name: str, title: str) -> str:
    text = f"{name}{title}"
    return text[0].upper() + text[1:]


def _events(record: Record) -> list[Block]:
    """Steps that were skipped or rolled back, spikes, and stages that were stopped."""
    log = record.log
    if not log.events:
        return []
    total = sum(log.event_counts.values())
    shown = log.events[:_EVENTS]
    rows = [
        [f"{event['step']:,}", str(event["stage"]), str(event["event"]), str(event.get("why") or "")] for event in shown
    ]
    caption = plural(total, "event") if total == len(rows) else f"The first {len(rows)} of {plural(total, 'event')}"
    blocks: list[Block] = [Table(caption, ("step", "stage", "what", "why"), rows, frozenset({1, 2, 3}))]
    if total > len(rows):
        kinds = [f"{kind} {count:,} times in {stage}" for (stage, kind), count in log.event_counts.items()]
        blocks.append(Prose("All of them: " + "; ".join(kinds) + "."))
    return blocks


def model_section(record: Record) -> Section:
    """What stood still and what learnt, as a picture and a table."""
    plan = record.freeze
    blocks: list[Block] = []
    if plan is not None:
        with reading(record.path / "freeze" / "freeze.json"):
            sizes = parameter_sizes([record.path / stage / "model" for stage in TRAINING_STAGES[::-1]])
            adapters = _adapters(record, plan)
            parts = model_parts(plan, sizes, adapters)
            text = _shares(plan) if adapters is None else _shares_beside(record, plan, adapters)
            blocks.append(Prose(" ".join([text, *(f"{note}." for note in plan.get("notes", []))])))
            if parts:
                blocks.append(Charts([figures.model_picture("model", parts)], wide=True))
            rows = [[what, state, f"{tensors:,}", number(count)] for what, state, tensors, count in runs_of(parts)]
            blocks.append(Table("Parts of the model", ("part", "state", "tensors", "parameters"), rows, frozenset({1})))
    elif record.adapter:
        left = _adapters_left(record)
        blocks.append(Prose(_adapters_told(record, None if left is None else left.parameters)))
    blocks += _sweep(record)
    blocks += _groups(record)
    return Section("model", "What learnt" if plan is None else "What stood still and what learnt", blocks)


def _adapters(record: Record, plan: Mapping[str, Any]) -> Adapters | None:
    """The adapters that fine-tuning left, or is to make; None where it trains the weights."""
    if record.adapter is None:
        return None
    return _adapters_left(record) or planned_adapters(plan)


def _adapters_left(record: Record) -> Adapters | None:
    return read_adapters(record.path / "finetune" / "adapter") if record.is_done("finetune") else None


def _shares(plan: Mapping[str, Any]) -> str:
    still, moves = int(plan["frozen_count"]), int(plan["trainable_count"])
    total = max(still + moves, 1)
    return (
        f"{short_count(still)} of {short_count(total)} parameters ({still / total:.1%}) stand still when training "
        f"begins, {short_count(moves)} ({moves / total:.1%}) learn."
    )


def _shares_beside(record: Record, plan: Mapping[str, Any], adapters: Adapters) -> str:
    """What stands still where adapters learn, and how much learns."""
    told = _adapters_told(record, adapters.parameters)
    if adapters.own_parameters is None:
        return told
    total = max(int(plan["frozen_count"]) + int(plan["trainable_count"]), 1)
    own = adapters.own_parameters
    if not own:
        return f"All {short_count(total)} parameters of the model stand still. {told}"
    still = f"{short_count(total - own)} of {short_count(total)} parameters of the model ({1 - own / total:.1%})"
    return f"{still} stand still, {number(own)} learn. {told}"


def _adapters_told(record: Record, parameters: int | None) -> str:
    keys = record.adapter or {}
    text = f"Adapters ({keys.get('name')}, rank {keys.get('rank')}) learn beside what stands still"
    return f"{text}: {plural(parameters, 'parameter')}." if parameters is not None else f"{text}."


def _sweep(record: Record) -> list[Block]:
    """The depths that the freeze stage tried."""
    trials = record.facts("freeze").get("trials") or []
    recommended = (record.facts("freeze").get("recommended") or {}).get("name")
    rows = [
        [
            str(trial["name"]) + (" (taken)" if trial["name"] == recommended else ""),
            number(trial.get("trainable_parameters")),
            duration(trial.get("seconds")),
            number(trial.get("loss")),
            number(trial.get("accuracy")),
        ]
        for trial in trials
    ]
    if not rows:
        return []
    blocks: list[Block] = [
        Table("Depths that were tried", ("trained", "parameters", "time", "held-out loss", "accuracy"), rows)
    ]
    if reason := record.facts("freeze").get("reason"):
        blocks.append(Prose(f"{str(reason)[0].upper()}{str(reason)[1:]}."))
    return blocks


def _groups(record: Record) -> list[Block]:
    """The parameter groups with their rates."""
    blocks: list[Block] = []
    for stage in TRAINING_STAGES:
        found: list[Any] = record.facts(stage).get("parameter_groups") or []
        rows = [
            [str(row[0]), *map(number, row[1:3]), *(f"{cell:.3g}" for cell in row[3:])]
            for row in found
            if len(row) == 5
        ]
        if rows:
            columns = ("group", "tensors", "parameters", "peak rate", "weight decay")
            blocks.append(Table(f"Parameter groups of {stage}", columns, rows))
    return blocks


def cost_rows(record: Record) -> list[list[str]]:
    """What each stage took: its state, time, tokens, speed and memory."""
    rows = []
    for name, entry in record.stages.items():
        found = record.metrics(name)
        tokens, speed = found.get("train_tokens"), found.get("tokens_per_second")
        rows.append(
            [
                name,
                state_of(record, name),
                duration(entry.get("seconds")),
                number(found.get("steps")),
                number(tokens),
                f"{speed:,.0f}" if isinstance(speed, int | float) else DASH,
                f"{found['peak_memory_bytes'] / 2**30:.1f} GiB" if found.get("peak_memory_bytes") else DASH,
            ]
        )
    return rows
