"""The page of a cross-validation: what the folds of a recipe say together."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmkit.data.personal.masking import without_secrets
from llmkit.files import read_json
from llmkit.report import figures
from llmkit.report.blocks import Block, Charts, Code, Figure, Prose, Section, Table
from llmkit.report.learning_curve import not_compared
from llmkit.report.names import name_of, spoken
from llmkit.report.record import TRAINING_STAGES, Record, read_record, reading
from llmkit.report.render import render
from llmkit.report.surroundings import surroundings_section
from llmkit.report.verdict import NONE, Change, Verdict, headline_metric, judged, together, worded
from llmkit.report.words import DASH, duration, interval, listed, number, plural, signed, title_of

CROSSVAL = "crossval.json"  # in a folder of folds
_ROUGH = (
    "Folds learn from much the same rows, so their scores are not independent of each other, and the intervals, of the "
    "mean by Student's t distribution, are rough ones."
)


def folds_html(folder: Path) -> str:
    """The page as text. Raises ArtifactError when crossval.json or a fold is damaged."""
    found: Any = read_json(folder / CROSSVAL)
    with reading(folder / CROSSVAL):
        runs = [run for run in found["runs"] if (folder / str(run["run"]) / "run.json").is_file()]
        records = [read_record(folder / str(run["run"])) for run in runs]
        metric = _headline_metric(found, records)
        verdict = _verdict(found, metric, records)
        sections = [_scores(found, runs, metric, verdict), _curves(records), _folds(found, runs)]
        sections += [surroundings_section(records[0]), _again(found, records[0])] if records else []
        return render(
            "report.html.j2",
            kind="crossval",
            title=str(found["name"]),
            sentence=_sentence(found, runs, records),
            failures=[],
            states=_states(folder, found),
            verdict=verdict,
            figures=_figures(found, runs, metric),
            sections=[section for section in sections if section.blocks],
        )


def lacking(found: Mapping[str, Any]) -> dict[tuple[str, str], list[int]]:
    """The folds that have no score, by metric and reason."""
    folds: dict[tuple[str, str], list[int]] = {}
    for who, metrics in (found.get("scores") or {}).items():
        for metric, run in ((metric, run) for metric in metrics for run in found["runs"]):
            if metric not in (run["scores"].get(who) or {}):
                why = ((run.get("reasons") or {}).get(who) or {}).get(metric) or "it was not scored there"
                numbers = folds.setdefault((metric, str(why)), [])
                numbers += [] if run["fold"] in numbers else [run["fold"]]
    return folds


def without_interval(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """The metrics whose mean, or difference of means, has no interval although several folds have one, by reason."""
    metrics: dict[str, list[str]] = {}
    for part in ("differences", "scores"):
        for metric, each in ((m, each) for by in (found.get(part) or {}).values() for m, each in by.items()):
            if why := each.get("why"):
                names = metrics.setdefault(str(why), [])
                names += [] if metric in names else [metric]
    return metrics


def _headline_metric(found: Mapping[str, Any], records: Sequence[Record]) -> str | None:
    """The metric that speaks for the task, of those that some fold has and all can be compared by."""
    if not records:
        return None
    means = {metric: each["mean"] for metric, each in ((found.get("scores") or {}).get("model") or {}).items()}
    metric = headline_metric(records[0], means or None)
    return None if metric in (found.get("left_out") or {}).get("metrics", ()) else metric


def _sentence(found: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], records: Sequence[Record]) -> str:
    done, folds = int(found["done"]), int(found["folds"])
    if not runs:
        return f"None of the {folds} folds is done yet."
    examples = number(sum(int(run["examples"]) for run in runs))
    model = f" from {without_secrets(str(records[0].recipe['model']))}" if records[0].recipe.get("model") else ""
    text = (
        f"{plural(len(runs), 'model')} trained{model}, each scored on the part of the data that it did not learn from: "
    )
    text += f"{examples} examples in all."
    return text if done == folds else f"{text} {done} of {folds} folds are done."


def _states(folder: Path, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    done = int(found["done"])
    states = []
    for fold in range(1, int(found["folds"]) + 1):
        begun = (folder / f"fold-{fold}" / "run.json").is_file()
        states.append((f"fold {fold}", "done" if fold <= done else "begun" if begun else "not begun"))
    return states


def _changes(found: Mapping[str, Any], who: str) -> list[Change]:
    """How the mean of each metric differs from another model's."""
    scores, changes = found["scores"], []
    for metric, each in (found.get("differences") or {}).get(who, {}).items():
        low, high = each.get("interval") or (None, None)
        means = each.get("means") or {one: scores[one][metric]["mean"] for one in (who, "model")}
        ends = means[who], means["model"]
        changes.append(Change(metric, who, *ends, low, high, None, judged(metric, each["mean"], low, high)))
    return changes


def _verdict(found: Mapping[str, Any], metric: str | None, records: Sequence[Record]) -> Verdict | None:
    mine = ((found.get("scores") or {}).get("model") or {}).get(metric)
    if metric is None or not mine:
        return None
    name, each = f"mean {title_of(metric)}", []
    for who in found.get("differences") or {}:
        changes, against = _changes(found, who), spoken(records[0], who)
        head = next((change for change in changes if change.metric == metric), None)
        if head is not None:
            over = plural(_count(found["differences"][who][metric]), "fold")
            each.append((against, worded(head, changes, name, against, over)))
    if each:
        return together(each)
    bounds = interval(mine["interval"])
    over = plural(_count(mine), "fold")
    sentence = f"The {name} over {over} is {number(mine['mean'])}" + (f" (95 % interval {bounds})" if bounds else "")
    return Verdict(NONE, "Scored", f"{sentence}; it was held against no other model.")


def _count(each: Mapping[str, Any]) -> int:
    """How many folds have a value."""
    return sum(value is not None for value in each["values"])


def _figures(found: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], metric: str | None) -> list[Figure]:
    mine = ((found.get("scores") or {}).get("model") or {}).get(metric)
    shown = []
    if metric is not None and mine:
        bounds = interval(mine["interval"])
        shown.append(
            Figure(f"mean {title_of(metric)}", number(mine["mean"]), f"95 % interval {bounds}" if bounds else "")
        )
        shown.append(Figure("from fold to fold", number(mine["std"]), "standard deviation"))
    if runs:
        shown.append(Figure("all folds took", duration(sum(float(run["seconds"]) for run in runs))))
    return shown


def _scores(
    found: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], metric: str | None, verdict: Verdict | None
) -> Section:
    """Means of both models, the headline metric as a chart, and all scores of all folds."""
    scores, others = found.get("scores") or {}, list(found.get("differences") or {})
    title = "Did it get better?" if others else "Scores"
    if not scores:
        return Section("scores", title, ())
    blocks: list[Block] = [Prose(verdict.more)] if verdict and verdict.more else []
    for who in others:
        changes = _changes(found, who)
        rows = [
            [
                *(title_of(change.metric), number(change.before), number(change.after), signed(change.difference)),
                *(interval([change.low, change.high]) or DASH, change.judgement or DASH),
            ]
            for change in changes
        ]
        marks = {(place, 5): change.mark for place, change in enumerate(changes) if change.mark}
        columns = ("metric", name_of(who, others), name_of("model", others), "difference", "95 % interval", "verdict")
        blocks.append(Table(f"Means over {plural(len(runs), 'fold')}", columns, rows, frozenset({5}), marks))
    if metric is not None:
        blocks.append(Charts([_chart(found, runs, metric, [*others, "model"])]))
    names = [f"fold {run['fold']}" for run in runs]
    for who in ("model", *others):
        rows = []
        for one, each in scores[who].items():
            values = [(run["scores"].get(who) or {}).get(one) for run in runs]
            cells = map(number, (*values, each["mean"], each["std"]))
            rows.append([title_of(one), *cells, interval(each["interval"]) or DASH])
        titles = ("metric", *names, "mean", "standard deviation", "95 % of the mean")
        blocks.append(Table(f"Scores by fold, {name_of(who, others)}" if others else "Scores by fold", titles, rows))
    return Section("scores", title, [*blocks, *_lacks(found), *not_compared(found), Prose(_ROUGH)])


def _lacks(found: Mapping[str, Any]) -> list[Block]:
    """Which folds have no score of some metric, and which means have no interval, and why."""
    told = [
        f"{title_of(metric)}: {listed([f'fold {fold}' for fold in folds])} {'has' if len(folds) == 1 else 'have'} none "
        f"({why})."
        for (metric, why), folds in lacking(found).items()
    ]
    if told:
        told.append(
            "Means are over the folds that have a score, and differences over those in which both models have one."
        )
    bare = [
        f"{listed([title_of(metric) for metric in metrics])}: no interval, because {why}."
        for why, metrics in without_interval(found).items()
    ]
    return [Prose(" ".join(some)) for some in (told, bare) if some]


def _chart(found: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], metric: str, who: Sequence[str]) -> Any:
    """Each fold's score with its own interval, and the mean of all with its."""
    drawn = []
    for run in runs:
        intervals = run.get("intervals") or {}
        values = {one: (run["scores"].get(one) or {}).get(metric) for one in who}
        ranges = {
            one: (value, (intervals.get(one) or {}).get(metric)) for one, value in values.items() if value is not None
        }
        drawn.append((f"fold {run['fold']}", ranges))
    means = {one: found["scores"][one].get(metric) for one in who}
    drawn.append(("mean", {one: (each["mean"], each["interval"]) for one, each in means.items() if each}))
    title = title_of(metric)
    return figures.ranges("folds", f"{title[0].upper()}{title[1:]} by fold", metric, drawn, who)


def _curves(records: Sequence[Record]) -> Section:
    charts = []
    for stage in TRAINING_STAGES:
        for key, title in (("loss", "training loss"), ("eval_loss", "held-out loss")):
            each = {record.path.name.replace("-", " "): record.log.curve(stage, key) for record in records}
            named = {name: curve for name, curve in each.items() if curve is not None and curve.count > 1}
            if named:
                charts.append(figures.curves(f"{stage}-{key}", f"{stage.capitalize()}: {title}", named, ""))
    return Section("training", "Training", [Charts(charts)] if charts else [])


def _folds(found: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Section:
    rows = [
        [
            *(f"fold {run['fold']}", f"{run['run']}/report.html", number(run["examples"])),
            *(number(run.get("train_examples")), duration(run["seconds"])),
        ]
        for run in runs
    ]
    columns = ("fold", "its own report", "held-out examples", "training examples", "time")
    caption = f"{plural(int(found['folds']), 'fold')}, each a run of its own"
    return Section("folds", "The folds", [Table(caption, columns, rows, frozenset({1}))] if rows else [])


def _again(found: Mapping[str, Any], first: Record) -> Section:
    words = ["llmkit", "crossval", str(first.path / "recipe.yaml"), "--folds", str(found["folds"])]
    command = shlex.join([*words, "-o", f"{found['name']}-crossval-again"])
    return Section("again", "How to do it again", [Code("The command that repeats it", command)])
