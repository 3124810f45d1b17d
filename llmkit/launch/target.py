"""What a job is, whatever system it runs on, and what such a system (a target) has to do for it.

A target is one file and one line in the catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Resources:
    """What a job asks for. `others` are options of the target's own, a value of None for one that takes none."""

    seconds: int  # after which the job is ended
    warning: int  # seconds before that, at which it is told to save
    nodes: int = 1
    processes: int = 1  # on each node
    gpus: int = 0  # on each node
    cpus: int | None = None  # for each process
    memory: str | None = None  # of each node
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    others: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True)
class Work:
    """One command: a stage, or `run`, of a recipe in a run directory."""

    recipe: Path
    run: Path


@dataclass(frozen=True)
class Job:
    """One job, or with several `works` an array of them. `folder` is where its script and its logs are kept."""

    name: str  # letters, digits and . _ -
    stage: str
    works: tuple[Work, ...]
    folder: Path
    resources: Resources
    is_array: bool = False
    at_once: int | None = None  # jobs of the array
    requeues: int = 100


@dataclass(frozen=True)
class Submitted:
    """A job that a target has taken on."""

    job: Job
    id: str
    log: str  # a path, with a `*` for the numbers of an array
    waits_for: str | None = None  # the system's word for it
    in_vain: str | None = None  # when nothing will come of waiting: why, and what to do


class Target(Protocol):
    """A system that runs jobs."""

    def check(self, job: Job) -> None:
        """Raises UsageError with all that it cannot say to the system, before anything is written."""

    def place(self, job: Job) -> Path:
        """The file that the script is kept in."""

    def script(self, job: Job) -> str:
        """What the system is given to run: readable, and good to be edited and handed in by hand."""

    def submit(self, job: Job, after: Sequence[str], each_after: str | None) -> Submitted:
        """Hands in the script on disk, to start when the jobs `after` are done well.

        `each_after` is an array of as many jobs: each one waits for its own. Raises UsageError when the system refuses,
        or does not know what to wait for.
        """

    def cancel(self, ids: Sequence[str]) -> None:
        """Takes jobs back."""

    def by_hand(self, job: Job, after: Sequence[str], each_after: str | None) -> list[str]:
        """The command that does so."""

    def waiting(self, ids: Sequence[str]) -> list[str]:
        """Those of some jobs that wait or run."""

    def to_follow(self, jobs: Sequence[Submitted]) -> list[tuple[list[str], str]]:
        """Commands that show how the jobs get on, and what each is for."""
