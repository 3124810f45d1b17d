"""What stages tell the outside world; `cli` draws it, scripts and tests may ignore it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Progress(Protocol):
    """A piece of work with a known length."""

    def advance(self, done: int = 1, **fields: str) -> None:
        """`done` more units are finished; `fields` are short texts to show beside (loss, speed)."""

    def close(self) -> None:
        """The work has ended."""


class Reporter(Protocol):
    """Receives what happens during a run."""

    def stage(self, name: str, state: str, why: str) -> None:
        """A stage is `running`, `resumed`, `done` or `unchanged`."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def warn(self, text: str) -> None:
        """Something that may be wrong."""

    def guess(self, key: str, value: str, source: str) -> None:
        """A value was chosen for the user; `source` says from what."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table."""

    def progress(self, title: str, total: int, unit: str) -> Progress:
        """Starts to show a piece of work."""


class SilentProgress:
    """Shows nothing."""

    def advance(self, done: int = 1, **fields: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class SilentReporter:
    """Shows nothing; the reporter of `--quiet`, of processes other than the first, and of tests."""

    def stage(self, name: str, state: str, why: str) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def warn(self, text: str) -> None:
        """Does nothing."""

    def guess(self, key: str, value: str, source: str) -> None:
        """Does nothing."""

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Does nothing."""

    def progress(self, title: str, total: int, unit: str) -> Progress:
        """A progress that shows nothing."""
        return SilentProgress()
