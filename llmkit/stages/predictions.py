"""What models said of examples, kept in the user's cache by all that decides it, so that nothing is computed twice.

A folder holds JSON Lines, each of one batch with its checksum: who is killed has lost a batch, and a line that was cut
short or damaged is left out and computed again.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np

from llmkit.files import cache_folder, digest_json
from llmkit.run.reporter import Reporter
from llmkit.tasks.base import Fields
from llmkit.tasks.scoring import ScoreTable

VERSION = 2  # raise it when the same model, corpus and precision come to give other scores
MOST_BYTES = 2 << 30  # of all that is kept; what was used longest ago goes first


class KeptScores(ScoreTable):
    """A table that is read from a folder of the cache, and adds to it; `key` is the digest of what decides the scores.

    `answers_key` is of what decides answers beside that. What cannot be written is said once, and then not kept.
    """

    def __init__(self, count: int, key: str, answers_key: str, reporter: Reporter) -> None:
        super().__init__(count)
        self.folder = cache_folder("predictions") / key[:24]
        self._answers_key, self._reporter = answers_key, reporter
        self._file: BinaryIO | None = None
        self._writes = True
        self._read()

    def add(self, numbers: list[int], fields: Fields) -> None:
        """Takes in scores, and keeps them."""
        super().add(numbers, fields)
        columns = {name: [str(values.dtype), values.tolist()] for name, values in fields.items()}
        self._write({"examples": numbers, "fields": columns})

    def add_untrained(self, parameters: tuple[str, ...]) -> None:
        """Takes in which of the model's parameters are new, and keeps that."""
        super().add_untrained(parameters)
        self._write({"examples": [], "untrained": list(parameters)})

    def add_answers(self, numbers: list[int], answers: list[str]) -> None:
        """Takes in answers, and keeps them."""
        super().add_answers(numbers, answers)
        self._write({"examples": numbers, "answers": answers, "how": self._answers_key})

    def close(self) -> None:
        """Ends writing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> None:
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                for line in file:
                    self._take(line)
        if self.folder.is_dir():
            os.utime(self.folder)  # used now

    def _take(self, line: bytes) -> None:
        """A batch that was kept, unless its line is damaged."""
        try:
            said = json.loads(line)
            entry, numbers = said["entry"], said["entry"]["examples"]
            if said["sha256"] != digest_json(entry)[:16] or not all(0 <= number < self.count for number in numbers):
                return
        except (ValueError, KeyError, TypeError):
            return
        if "untrained" in entry:
            super().add_untrained(tuple(entry["untrained"]))
            return
        if "answers" in entry:
            if entry["how"] == self._answers_key:
                super().add_answers(numbers, entry["answers"])
            return
        super().add(numbers, {name: np.array(values, dtype) for name, (dtype, values) in entry["fields"].items()})

    def _write(self, entry: dict[str, Any]) -> None:
        if not self._writes:
            return
        line = json.dumps({"sha256": digest_json(entry)[:16], "entry": entry}, ensure_ascii=False)
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = (self.folder / f"{uuid4().hex[:12]}.jsonl").open("wb")
            self._file.write(line.encode("utf-8", "replace") + b"\n")
            self._file.flush()
        except OSError as error:
            self._writes = False
            self._reporter.warn(
                f"scores cannot be kept in {self.folder} ({error}): they will be computed again next time"
            )


def make_room(keep: set[Path], most_bytes: int = MOST_BYTES) -> None:
    """Removes the scores that were used longest ago until all take `most_bytes` at most, but for the folders to keep."""
    cache = cache_folder("predictions")
    sizes = {
        folder: sum(file.stat().st_size for file in folder.glob("*.jsonl"))
        for folder in cache.glob("*")
        if folder.is_dir()
    }
    for folder in sorted(sizes, key=lambda folder: folder.stat().st_mtime):
        if sum(sizes.values()) <= most_bytes:
            return
        if folder not in keep:
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]
