"""`srun llmkit probe`: what training would find of the processes that a launcher starts, without a recipe."""

from __future__ import annotations

import os
import warnings
from dataclasses import asdict

from llmkit.cli.console import make_table, standard_error, standard_output
from llmkit.cli.output import errors_shown, print_json
from llmkit.errors import UsageError
from llmkit.recipe.values import seconds_of

_COLUMNS = ("rank", "host", "process", "device", "free", "versions", "clock")


def probe_command(within: str, *, as_json: bool) -> None:
    """Compares the processes and measures how they talk; the first one prints it."""
    warnings.simplefilter("ignore")  # Accelerate's, of settings for training
    count, lead = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")) == 0
    with errors_shown(as_json=as_json and lead):
        from llmkit.stages import probe
        from llmkit.stages.processes import losses_told
        from llmkit.stages.rendezvous import connect

        try:
            seconds = seconds_of(within)
        except ValueError as error:
            raise UsageError("this is not a time", got=within, expected=str(error), where="--within") from None
        found, speed = [probe.own_facts(0, {}, sees_folder=True)], None
        if count > 1:
            with losses_told():
                found, device, group = connect(seconds, {}, None)
                speed = probe.measure(device, group)
        if not lead:
            return
        if as_json:
            print_json(
                {"processes": [asdict(facts) for facts in found], "speed": None if speed is None else asdict(speed)}
            )
            return
        console = standard_output()
        console.print(make_table("processes", _COLUMNS, probe.rows(found, speed)))
        if speed is None:
            console.print("one process: `srun llmkit probe` or `torchrun -m llmkit probe` starts several")
            return
        console.print(probe.in_words(found, speed))
        clocks = probe.wrong_clocks(found, speed)
        if clocks is not None:
            standard_error().print(f"warning: {clocks}")
