"""A job's time: how it is written, how long before its end it is warned, and whether a checkpoint can be saved by then."""

from __future__ import annotations

import re

from llmkit.errors import UsageError
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import duration, seconds_of
from llmkit.train.when import ASSUMED_SPEED

_TIME = re.compile(r"(?:(?P<days>\d{1,4})-)?(?P<rest>\d{1,6}(?::\d{1,2}){0,2})", re.ASCII)
_LONGEST = 365 * 86_400  # seconds
_STATES = 3  # of each trainable weight in a checkpoint: itself, and two moments


def seconds_in(text: str, flag: str = "--time") -> int:
    """A time as Slurm writes it (`30`: minutes, `4:00:00`, `1-12`: a day and 12 hours) or as llmkit does (`4h`, `90s`).

    Raises UsageError.
    """
    match = _TIME.fullmatch(text)
    found = 0.0
    if match is None:
        try:
            found = seconds_of(duration(text))
        except ValueError:
            raise _no_time(text, flag) from None
    else:
        parts = [int(part) for part in match["rest"].split(":")]
        if match["days"] is not None or len(parts) == 3:  # hours come first
            hours, minutes, seconds = (*parts, 0, 0)[:3]
        else:
            hours, minutes, seconds = 0, *(*parts, 0)[:2]
        if len(parts) > 1 and max(parts[1:]) > 59:
            raise _no_time(text, flag)
        found = ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 1 <= found <= _LONGEST:
        raise _no_time(text, flag)
    return int(found)


def _no_time(text: str, flag: str) -> UsageError:
    return UsageError(
        f"{flag} has no time that Slurm knows",
        got=text,
        expected="for example 4:00:00 (hours), 30 (minutes), 1-12 (a day and 12 hours), 90min or 4h; a year at most",
        where=flag,
    )


def shown(seconds: int) -> str:
    """A time as Slurm writes it: `4:00:00`, `1-12:00:00`."""
    days, rest = divmod(seconds, 86_400)
    clock = f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock.rjust(8, '0')}" if days else clock


def checkpoint_bytes(recipe: Recipe) -> int | None:
    """About how much a checkpoint of the largest training holds, from the model's config; None without pretrained weights.

    Raises what finding the config raises.
    """
    if recipe.model is None or not {"pretrain", "finetune"} & set(recipe.plan):
        return None
    from llmkit.model.adapters import add_adapters
    from llmkit.model.loading import build_on_meta, load_config
    from llmkit.model.location import locate_config
    from llmkit.stages.base import adapter_rules, freeze_plan, task_class

    pretrains = "pretrain" in recipe.plan
    config = load_config(locate_config(recipe.model))
    model = build_on_meta(config, "AutoModelForCausalLM" if pretrains else task_class(recipe).auto_class)
    frozen: frozenset[str] = frozenset()
    if not pretrains and "freeze" in recipe.plan and recipe.freeze is not None and not recipe.freeze.by_evidence:
        frozen = freeze_plan(recipe, model).frozen_for_good
    if not pretrains and recipe.finetune.adapter is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        add_adapters(model, adapter_rules(recipe.finetune.adapter), frozen)
        return _STATES * 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return _STATES * 4 * sum(p.numel() for name, p in model.named_parameters() if name not in frozen)


def warning_for(limit: int, warning: int | None, nbytes: int | None) -> int:
    """How many seconds before its end a job is warned: `warning`, or enough for two checkpoints, and two minutes at least.

    Raises UsageError when a checkpoint may take longer than that, or when the limit leaves no time to train.
    """
    saving = round((nbytes or 0) / ASSUMED_SPEED)
    given = warning is not None
    warning = warning if warning is not None else max(120, 60 + 2 * saving)
    takes = f"a checkpoint of {(nbytes or 0) / 1e9:,.1f} GB may take {shown(saving)}"
    if warning <= saving:
        raise UsageError(
            "the warning comes too late to save",
            got=f"--warning of {shown(warning)}",
            expected=f"more: {takes}",
            where="--warning",
        )
    if limit <= warning + saving:
        raise UsageError(
            "the time limit leaves no time to train",
            got=f"--time of {shown(limit)}",
            expected=f"more than {shown(warning + saving)}: the warning comes {shown(warning)} before the end"
            + (f", and {takes}" if saving else ""),
            hint="give it more time" + ("" if given else ", or set --warning"),
            where="--time",
        )
    return warning
