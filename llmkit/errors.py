"""The errors a user can meet: each says what was wrong, what was expected and what to do, and carries its exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake, ready to be shown: `where` is a file with its line, or the flag or recipe key at fault."""

    what: str
    got: str | None = None
    expected: str | None = None
    hint: str | None = None
    where: str | None = None


class LlmkitError(Exception):
    """A failure with an exit code, a sentence for people and fields for scripts. `problems` holds every mistake found."""

    kind = "error"
    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: str | None = None,
        hint: str | None = None,
        where: object = None,
        problems: Iterable[Problem] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.got = None if got is None else str(got)
        self.expected = expected
        self.hint = hint
        self.where = None if where is None else str(where)
        self.problems: tuple[Problem, ...] = tuple(problems) or (
            Problem(self.what, self.got, self.expected, self.hint, self.where),
        )


class UsageError(LlmkitError):
    """The command line is wrong, or does not fit what is on disk."""

    kind = "usage"
    exit_code = 2


class RecipeError(LlmkitError):
    """The recipe is wrong: a misspelt key, a wrong type, a name that nothing answers to."""

    kind = "recipe"
    exit_code = 2


class DataError(LlmkitError):
    """The data is missing, unreadable or not what the task needs."""

    kind = "data"
    exit_code = 3


class ArtifactError(LlmkitError):
    """A model, checkpoint or artifact is missing or damaged."""

    kind = "artifact"
    exit_code = 4


class ResourceError(LlmkitError):
    """Not enough memory, disk, devices or permissions."""

    kind = "resource"
    exit_code = 5


class DivergedError(LlmkitError):
    """Training produced a loss or gradient that is not a finite number."""

    kind = "diverged"
    exit_code = 6


class StoppedError(LlmkitError):
    """Stopped by SIGTERM, SIGUSR1 or a time limit, after saving; the same command goes on from there."""

    kind = "stopped"
    exit_code = 75


class InterruptedByUserError(LlmkitError):
    """Stopped by Ctrl-C, after saving; the same command goes on from there."""

    kind = "interrupted"
    exit_code = 130


KINDS: dict[str, type[LlmkitError]] = {
    kind.kind: kind
    for kind in (
        LlmkitError,
        UsageError,
        RecipeError,
        DataError,
        ArtifactError,
        ResourceError,
        DivergedError,
        StoppedError,
        InterruptedByUserError,
    )
}


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the closest known word, or None when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else None


def raise_all(problems: Sequence[Problem]) -> None:
    """Raises a RecipeError with all problems, if there are any."""
    if problems:
        first = problems[0]
        raise RecipeError(
            first.what, got=first.got, expected=first.expected, hint=first.hint, where=first.where, problems=problems
        )
