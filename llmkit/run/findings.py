"""What checking a run found: a row for each thing checked, and what is damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmkit.errors import Problem


@dataclass
class Check:
    """What was found of one thing: a stage, a corpus, a checkpoint, a file."""

    what: str
    files: int = 0
    nbytes: int = 0
    by_size_only: int = 0  # files of an older run, which noted no checksums
    state: str | None = None  # why there is nothing to compare: a stage that is not finished, say
    folder: Path | None = None  # of a checkpoint, which a run that is at work may delete
    problems: list[Problem] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.problems:
            return f"{len(self.problems)} damaged"
        if self.state is not None:
            return self.state
        return f"ok, {self.by_size_only} by size only" if self.by_size_only else "ok"

    def fault(self, what: str, path: Path | str, got: object, expected: str | None, hint: str | None) -> None:
        """Notes that something is damaged."""
        self.problems.append(Problem(what, str(got), expected, hint, str(path)))


@dataclass
class Verification:
    """All checks of a run; `notes` name what is odd and no damage."""

    files: int = 0  # that were compared, each once
    nbytes: int = 0
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """What is damaged, each thing once, whatever vouches for it."""
        return list(dict.fromkeys(problem for check in self.checks for problem in check.problems))
