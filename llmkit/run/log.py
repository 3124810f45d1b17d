"""`metrics.jsonl`: one JSON object a logged step, each step once whatever was killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmkit.files import write_atomically


class MetricsLog:
    """Appends to a run's metrics.jsonl for one stage; opening it forgets that stage's lines after `step`."""

    def __init__(self, path: Path, stage: str, *, step: int) -> None:
        self.path = path
        self.stage = stage
        kept = [line for line in read_metrics(path) if line["stage"] != stage or line["step"] <= step]
        write_atomically(path, "".join(_line(line) for line in kept))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends one object."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line({"stage": self.stage, "step": step} | values))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a metrics.jsonl; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
