"""`metrics.jsonl`: one JSON object a logged step, each step once whatever was killed and resumed."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmkit.files import sync_file, write_atomically


class MetricsLog:
    """Appends to a run's metrics.jsonl for one stage; opening it forgets that stage's lines after `step`."""

    def __init__(self, path: Path, stage: str, *, step: int, refused: int = 0) -> None:
        self.path = path
        self.stage = stage
        self._waiting: list[str] = []  # lines that the disk has not taken
        self.forget_after(step, refused)

    def forget_after(self, step: int, refused: int) -> None:
        """Takes out this stage's lines of later steps, and of refused steps but the first so many."""

        def stays(line: dict[str, Any]) -> bool:
            counted: bool = line["refused"] <= refused if "refused" in line else line["step"] <= step
            return line["stage"] != self.stage or counted

        kept = [line for line in read_metrics(self.path) if stays(line)]
        write_atomically(self.path, "".join(_line(line) for line in kept))

    def sync(self) -> None:
        """Makes what was written survive a power cut. Raises OSError when the disk does not take it."""
        self._append()
        sync_file(self.path)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends one object; when the disk does not take it, it waits for the next."""
        self._waiting.append(_line({"stage": self.stage, "step": step} | values))
        with suppress(OSError):
            self._append()

    def _append(self) -> None:
        """Raises OSError, and leaves no half of a line that waits."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._waiting))
        except OSError:
            os.truncate(self.path, size)
            raise
        self._waiting = []


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
