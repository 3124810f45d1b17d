"""The head of a report: what was done in one sentence, how far it came, and the numbers that stand out."""

from __future__ import annotations

from typing import Any

from llmkit.data.personal.masking import without_secrets
from llmkit.report.blocks import Figure
from llmkit.report.names import name_of, own_uri, spoken
from llmkit.report.record import TRAINING_STAGES, Record
from llmkit.report.states import states
from llmkit.report.verdict import changes, headline_metric
from llmkit.report.words import bytes_, duration, interval, listed, number, plural, short_count, signed, title_of

_TASKS = {
    "classify": "to classify texts",
    "chat": "to answer in conversations",
    "text": "on plain text",
    "regress": "to predict numbers",
}
_STATES = {"running": "is running", "stopped": "was stopped"}


def what_was_done(record: Record) -> str:
    """One sentence: the stages that are done, on what, with how much."""
    told = {
        "preprocess": _prepared,
        "pretrain": _pretrained,
        "freeze": _froze,
        "finetune": _tuned,
        "evaluate": _scored,
        "export": _exported,
    }
    parts = [text for name in record.stages if record.is_done(name) and (text := told[name](record))]
    open_ = [
        f"{name} {_STATES.get(state, state or 'failed')}{_reached(record, name)}"
        for name, state in states(record)
        if state != "done"
    ]
    text = f"This run {listed(parts)}" if parts else "This run has finished nothing yet"
    return f"{text}; {listed(open_)}." if open_ else f"{text}."


def _reached(record: Record, stage: str) -> str:
    """How far a training came."""
    steps = [curve.last[0] for curve in record.log.curves.get(stage, {}).values()]
    steps += [int(event["step"]) for event in record.log.events if event["stage"] == stage]
    if not steps:
        return ""
    total = record.stages[stage].get("total_steps")
    return f" at step {max(steps):,}" + (f" of {total:,}" if isinstance(total, int) else "")


def _sources(found: Any) -> str:
    """The URIs of a recipe's data."""
    items = found if isinstance(found, list) else [found]
    uris = [str(item.get("uri")) if isinstance(item, dict) else str(item) for item in items if item]
    return without_secrets(listed(uris[:2]) + (f" and {len(uris) - 2} more" if len(uris) > 2 else ""))


def _prepared(record: Record) -> str:
    if set(record.stages) - {"preprocess"}:
        return ""
    read, found = record.metrics("preprocess").get("rows_read"), record.metrics("preprocess")
    examples = sum(int(value) for key, value in found.items() if key.endswith("_examples"))
    where = _sources((record.recipe.get("data") or {}).get("train"))
    return f"made {plural(examples, 'example')} of {number(read)} rows of {where}"


def _pretrained(record: Record) -> str:
    keys = record.recipe.get("pretrain") or {}
    data = _sources(keys.get("data") or (record.recipe.get("data") or {}).get("train"))
    if record.recipe.get("model"):
        what = f"trained {without_secrets(str(record.recipe['model']))} further on plain text"
    else:
        kind = (keys.get("architecture") or {}).get("model_type")
        what = f"trained a new {kind or 'model'} from scratch"
    return f"{what} ({data}, {_amount(record, 'pretrain')})"


def _amount(record: Record, stage: str) -> str:
    found = record.metrics(stage)
    return f"{plural(int(found.get('steps') or 0), 'step')}, {short_count(found.get('train_tokens'))} tokens"


def _froze(record: Record) -> str:
    found = record.metrics("freeze")
    still, moves = found.get("frozen_parameters") or 0, found.get("trainable_parameters") or 0
    return f"froze {still / max(still + moves, 1):.0%} of {short_count(still + moves)} parameters"


def _tuned(record: Record) -> str:
    model = record.recipe.get("model")
    what = "it" if record.is_done("pretrain") or not model else without_secrets(str(model))
    data = _sources((record.recipe.get("data") or {}).get("train"))
    how = f"with adapters ({record.adapter.get('name')})" if record.adapter else ""
    words = ["fine-tuned", what, how, _TASKS.get(record.task, ""), f"({data}, {_amount(record, 'finetune')})"]
    return " ".join(filter(None, words))


def _scored(record: Record) -> str:
    examples = plural(int((record.results or {}).get("examples") or 0), "held-out example")
    others = [spoken(record, who) for who in record.others]
    return f"scored {_model(record)} on {examples}" + (f" against {listed(others)}" if others else "")


def _model(record: Record) -> str:
    """The model by its URI, unless what the run did before has named it."""
    return own_uri(record) or "a model" if record.only_scores else "it"


def _exported(record: Record) -> str:
    formats = sorted(record.facts("export")) or ["transformers"]
    return f"exported it ({listed(formats)})"


def key_figures(record: Record) -> list[Figure]:
    """A handful of numbers for the head of the page."""
    found = []
    metric, results = headline_metric(record), record.results or {}
    if metric is not None:
        change = next((c for who in record.others[:1] for c in changes(results, who) if c.metric == metric), None)
        bounds = interval(((results.get("intervals") or {}).get("model") or {}).get(metric))
        note = f"95 % interval {bounds}" if bounds else ""
        if change is not None:
            name = "before" if change.who == "parent" else f"for {name_of(change.who, record.others)}"
            note = f"{number(change.before)} {name}, {signed(change.difference)}"
        found.append(Figure(title_of(metric), number(results["model"][metric]), note))
    for stage in TRAINING_STAGES[::-1]:
        metrics = record.metrics(stage)
        curve = record.log.curve(stage, "eval_loss") or record.log.curve(stage, "loss")
        if metrics:
            speed = f"{metrics['tokens_per_second']:,.0f} tokens / s" if metrics.get("tokens_per_second") else ""
            found.append(Figure(f"{stage} took", duration(record.stages[stage].get("seconds")), speed))
            if metrics.get("peak_memory_bytes"):
                found.append(Figure("peak memory", bytes_(metrics["peak_memory_bytes"]), stage))
            break
        if curve is not None:
            name = "held-out loss" if record.log.curve(stage, "eval_loss") else "training loss"
            found.append(Figure(name, number(curve.last[1]), f"at step {curve.last[0]:,}"))
            break
    found += _learning(record)
    train = ((record.statistics or {}).get("corpora") or {}).get("train") or {}
    if train.get("examples") and not record.only_scores:
        tokens = f"{short_count(train['tokens'])} tokens"
        found.append(Figure("training examples", number(int(train["examples"])), tokens))
    return found


def _learning(record: Record) -> list[Figure]:
    """How many parameters learn, of how many or beside how many."""
    learns, plan = record.learning_parameters, record.metrics("freeze")
    total = sum(plan.get(f"{kind}_parameters") or 0 for kind in ("frozen", "trainable"))
    if learns is None:
        return []
    if record.adapter:
        note = f"with adapters, beside {short_count(total)}" if total else "with adapters"
        return [Figure("parameters that learn", number(learns), note)]
    return [Figure("parameters that learn", short_count(learns), f"of {short_count(total)}" if total else "")]
