"""What each of two processes does in test_probe.py, with its outcome in a file."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from llmkit.errors import LlmkitError
from llmkit.recipe.load import load_recipe
from llmkit.run.directory import Run
from llmkit.run.reporter import SilentReporter
from llmkit.stages import probe, processes


class Heard(SilentReporter):
    """Keeps notes and warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(f"warning: {text}")


def main(place: str, recipe: str, case: str) -> None:
    """Meets the other process as a training would, with what the case says of this one."""
    rank, given = int(os.environ["RANK"]), json.loads(case)
    mine = given.get(str(rank), {})
    out, outcome, began = Path(place) / f"outcome-{rank}.json", {}, time.monotonic()
    run_folder = Path(place) / mine.get("folder", "run")
    if "version" in mine:
        probe.__version__ = mine["version"]  # type: ignore[misc]
    if "ahead" in mine:
        now = time.time
        probe.time.time = lambda: now() + mine["ahead"]  # type: ignore[assignment]
    processes._LAUNCHER_FIRST = timedelta(0)
    probe._LATE = 1.0
    heard = Heard()
    loaded = load_recipe(Path(recipe), []).model_copy(update={"seed": mine.get("seed", 17)})
    run = Run.open(run_folder, "met", "name: met\n", heard, lead=rank == 0)
    run.reporter = heard
    try:
        with processes.losses_told():
            found = processes.Processes(loaded, run)
            outcome["decided"] = found.decide(lambda: {"rank": rank})
            time.sleep(mine.get("alone", 0.0))
            if mine.get("leaves"):
                os._exit(3)
            found.meet(run)
            found.require_same("the inputs of finetune", lambda: {"parent": mine.get("parent", "a")})
            found.part()
            outcome["state"] = run.record.get("name")
    except LlmkitError as error:
        outcome |= {"kind": error.kind, "what": error.what, "got": error.got, "hint": error.hint}
    outcome |= {"said": heard.said, "seconds": time.monotonic() - began}
    out.write_text(json.dumps(outcome, default=str))


def place_of(folder: Path, rank: int) -> dict[str, Any]:
    """What a process left."""
    found: dict[str, Any] = json.loads((folder / f"outcome-{rank}.json").read_text())
    return found
