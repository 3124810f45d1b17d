"""`llmkit plan`: what will happen before it happens, as tables or JSON."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape

from llmkit.cli.console import make_table, standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.cli.recipes import Flags, recipe_from, run_directory
from llmkit.cli.scale import Machines, cluster_of, plan_on_cluster, readable, tokens_of
from llmkit.cli.stages import make_reporter, open_run, quieten_libraries
from llmkit.errors import UsageError

_PARTS = {
    "weights": "weights",
    "masters": "fp32 copies of the weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations and logits",
    "kernels": "kernels for each shape",
    "loading": "more than that while loading, in fp32",
    "program": "the program itself",
}


def plan_command(flags: Flags, machines: Machines, *, measure: bool, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Foretells steps, memory and time of every stage that trains, here or on the machines that are named."""
    started = time.monotonic()
    reporter = make_reporter(quiet=quiet)
    with errors_shown(as_json=as_json):
        if machines.named:
            _refuse_early(machines, measure)
        recipe = recipe_from(flags, "plan", reporter)
        path = run_directory(flags, recipe)
    with errors_shown(as_json=as_json, run_dir=path):
        quieten_libraries(verbose=verbose)
        from llmkit.stages.plan import plan_stages
        from llmkit.stages.preflight import check_recipe

        check_recipe(recipe, recipe.plan, path)
        run = open_run(path, recipe, reporter, lead=True)
        try:
            if machines.named:
                plan_on_cluster(recipe, run, machines, as_json=as_json, path=path)
                return
            plans = plan_stages(recipe, run, measure=measure)
        finally:
            run.close()
        if as_json:
            print_json(
                {
                    "status": "done",
                    "command": "plan",
                    "run_dir": str(path),
                    "seconds": round(time.monotonic() - started, 2),
                    "metrics": {plan.stage: {k: v for k, v in asdict(plan).items() if k != "stage"} for plan in plans},
                    "artifacts": {},
                }
            )
            return
        for plan in plans:
            _show(standard_output(), plan)


def _refuse_early(machines: Machines, measure: bool) -> None:
    """Raises UsageError for what is wrong with the machines, before any data are read."""
    cluster_of(machines)
    tokens_of(machines.tokens)
    if measure:
        raise UsageError(
            "steps can be measured on this machine only", got="--measure with a cluster", hint="leave one of them out"
        )


def _show(console: Console, plan: Any) -> None:
    total = plan.trainable_parameters + plan.frozen_parameters
    rows: list[tuple[str, str]] = [("data", plan.data)]
    if plan.examples is not None:
        rows.append(("examples", f"{plan.examples:,}"))
    supervised = f", {plan.supervised:,} of the corpus supervised" if plan.supervised is not None else ""
    rows += [
        ("tokens", f"{plan.tokens:,}{supervised}"),
        ("steps", f"{plan.steps:,} of about {plan.tokens / plan.steps:,.0f} tokens"),
        ("padding", f"{plan.padding_share:.1%} of what is computed"),
        ("trainable", f"{plan.trainable_parameters:,} parameters ({plan.trainable_parameters / total:.1%})"),
        ("frozen", f"{plan.frozen_parameters:,} parameters"),
        ("precision", plan.precision),
        ("at once", f"{plan.micro_batch_tokens:,} tokens at most"),
    ]
    if plan.frozen_prefix_blocks:
        kept = (
            f"computed once, {plan.cache_bytes / 2**30:,.2f} GiB on disk" if plan.cache_bytes else "computed each time"
        )
        rows.append(("frozen prefix", f"{plan.frozen_prefix_blocks} blocks, {kept}"))
    rows += [(_PARTS[name], f"{value / 2**30:,.2f} GiB") for name, value in plan.memory_bytes.items()]
    verdict = "fits" if plan.fits else "does not fit"
    rows.append(
        (
            "peak memory",
            f"{plan.peak_memory_bytes / 2**30:,.2f} GiB: {verdict} into {plan.available_bytes / 2**30:,.1f}",
        )
    )
    rows.append(("time", f"{readable(plan.seconds)} ({plan.seconds_from})"))
    console.print(make_table(f"\n{plan.stage}", ("", ""), [(name, escape(text)) for name, text in rows]))
    if not plan.fits:
        console.print(
            "[bold]to make it fit[/]  freeze more, set activation_checkpointing: true, lower data.max_length, "
            "or choose `optimizer: adafactor`",
            soft_wrap=True,
        )
