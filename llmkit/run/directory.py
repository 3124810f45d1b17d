"""The run directory: `run.json`, the folder of each stage, and the lock that keeps a second run out.

A finished stage is never deleted. When its inputs change, its folder moves to `previous/STAGE-FINGERPRINT` before the
stage runs again.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmkit import __version__
from llmkit.errors import LlmkitError, ResourceError, UsageError
from llmkit.files import digest_json, read_json, write_atomically, write_json
from llmkit.run.reporter import Reporter, SilentReporter
from llmkit.run.seals import holds, seal

_LOOKED_AT = 0.2  # seconds that `llmkit runs` may hold a lock at most, to see whether it is free
_LETTING_GO = 30.0  # seconds until the lock of a process that has ended is free
_LEFT = (".*.tmp", ".tmp??????")  # by processes that were killed: as llmkit names them, and as safetensors does
_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class Artifact:
    """What a stage leaves behind.

    `content` is the digest of what later stages read; a stage that ran again and made the same bytes changes nothing
    for them. `files` are the files, relative to the run, that must be unchanged for the stage to count as done; the
    `checksums` of those that are known need not be computed again.
    `disposable` is what only served to make the artifact; it is deleted once run.json says that the stage is done.
    """

    stage: str
    folder: Path
    content: str
    files: tuple[str, ...]
    metrics: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    disposable: tuple[Path, ...] = ()
    checksums: Mapping[str, str] = field(default_factory=dict)  # SHA-256 by name relative to the run


@dataclass(frozen=True)
class _Before:
    """What there was of a stage before it began anew."""

    entry: dict[str, Any]
    folder: Path


class Run:
    """One run directory, locked for this process. Use `Run.open`."""

    def __init__(
        self,
        path: Path,
        record: dict[str, Any],
        reporter: Reporter,
        lock: FileLock | None,
        recipe_text: str | None = None,
    ) -> None:
        self.path = path
        self.record = record
        self.reporter = reporter
        self._lock = lock
        self._recipe_text = recipe_text
        self.deadline: float | None = None  # of `time.monotonic`: when the command has to be over
        self._before: _Before | None = None  # what the stage that runs takes the place of
        self._recipe_before: str | None = None  # until a stage of this command is done
        self._finished = False

    @classmethod
    def open(
        cls, path: Path, name: str, recipe_text: str, reporter: Reporter | None = None, *, lead: bool = True
    ) -> Run:
        """Opens or makes the run directory of a recipe; its `recipe.yaml` is replaced when the first stage starts.

        `lead` is False in the processes of a distributed run that only read. Raises UsageError when the directory
        belongs to another recipe or to something else, and ResourceError when it cannot be written or is in use.
        """
        if not lead:  # which may come before the one that makes it
            known = read_json(path / "run.json") if (path / "run.json").exists() else {"stages": {}, "guesses": {}}
            return cls(path, known, SilentReporter(), None)
        _refuse_foreign(path, name)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path / ".lock", timeout=_LOOKED_AT)
            lock.acquire()
        except Timeout:
            raise ResourceError(
                "the run directory is in use",
                got=f"{path}{_owner(path)}",
                expected="one llmkit at a time in a run",
                hint="wait, or use -o",
            ) from None
        except OSError as error:
            raise ResourceError(
                "the run directory cannot be written",
                got=error.strerror or str(error),
                where=path,
                hint="choose another -o",
            ) from None
        for left in [found for name in _LEFT for found in (*path.glob(name), *path.glob(f"*/{name}"))]:
            if left.is_file():
                left.unlink()
        known = read_json(path / "run.json") if (path / "run.json").exists() else {}
        record = {"name": name, "created": _now(), "stages": {}, "guesses": {}} | known | _surroundings()
        record["process"] = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
        run = cls(path, record, reporter or SilentReporter(), lock, recipe_text)
        for stage, entry in run.record["stages"].items():
            if entry.get("disposable"):  # left by a process that was killed
                run._dispose(stage)
        if not (path / "recipe.yaml").exists():
            write_atomically(path / "recipe.yaml", recipe_text)
        run.save()
        return run

    @classmethod
    def peek(cls, path: Path, name: str) -> Run:
        """A recipe's run as it stands, or an empty one, to read only. Raises UsageError as `open` does."""
        _refuse_foreign(path, name)
        known = read_json(path / "run.json") if (path / "run.json").exists() else {}
        return cls(path, {"name": name, "stages": {}, "guesses": {}} | known, SilentReporter(), None)

    def close(self) -> None:
        """Lets go of the lock."""
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """While entered, other processes may open the run and its recipe; after that, this one has read what they left.

        Where they failed and left all stages as they were, so is the recipe.
        """
        stages, failed = deepcopy(self.record["stages"]), True
        self._write_recipe()
        self.close()
        try:
            yield
            failed = False
        finally:
            if self._lock is not None:
                self._lock.acquire(timeout=_LETTING_GO)
            self.reload()
            if failed and not self._finished and self.record["stages"] == stages:
                self._take_back_recipe()
            else:
                self._write_recipe()
            if not failed:
                self._recipe_before, self._finished = None, True

    def _write_recipe(self) -> None:
        if self._recipe_text is not None:
            if self._recipe_before is None and not self._finished and (self.path / "recipe.yaml").exists():
                self._recipe_before = (self.path / "recipe.yaml").read_text(encoding="utf-8")
            write_atomically(self.path / "recipe.yaml", self._recipe_text)

    def save(self) -> None:
        """Writes run.json; does nothing in a process that only reads."""
        if self._lock is not None:
            write_json(self.path / "run.json", self.record)

    def reload(self) -> None:
        """Reads run.json again."""
        self.record = read_json(self.path / "run.json")

    def folder(self, stage: str) -> Path:
        """The folder of a stage, whether or not it exists."""
        return self.path / stage

    def stage(self, stage: str) -> dict[str, Any]:
        """What run.json says of a stage; empty when it never ran."""
        found: dict[str, Any] = self.record["stages"].get(stage, {})
        return found

    def is_done(self, stage: str) -> bool:
        """True when a stage has finished and its files are still what they were."""
        entry = self.stage(stage)
        return entry.get("state") == "done" and not self.missing_files(stage)

    def missing_files(self, stage: str) -> list[str]:
        """The files of a finished stage that are gone or changed."""
        seals = self.stage(stage).get("files", {})
        return [name for name, expected in seals.items() if not holds(self.path / name, expected)]

    def start(self, stage: str, inputs: dict[str, Any], *, keep: bool) -> Path:
        """Notes that a stage starts and gives its folder: a fresh one, or with `keep` the one that is there.

        What is kept from other inputs may be gone on from: run.json names their fingerprints under `accepts`.
        """
        folder, before = self.folder(stage), self.stage(stage)
        self._before = None
        if not keep and folder.exists() and (aside := self._put_aside(stage)) is not None:
            self._before = _Before(before, aside)
        folder.mkdir(parents=True, exist_ok=True)
        entry = {"state": "running", "started": _now(), "fingerprint": digest_json(inputs), "inputs": inputs}
        accepts = {*before.get("accepts", ()), before.get("fingerprint")} - {entry["fingerprint"], None}
        if keep and accepts:
            entry["accepts"] = sorted(accepts)
        self.record["stages"][stage] = entry
        self._write_recipe()
        self.save()
        return folder

    def take_back(self, stage: str) -> bool:
        """Undoes the start of a stage that came to nothing: what it took the place of is there again, and its recipe.

        False where there was nothing, or other stages of this command are done.
        """
        before, self._before = self._before, None
        if self._finished:
            return False
        self._take_back_recipe()
        if before is None:
            return False
        shutil.rmtree(self.folder(stage))
        before.folder.rename(self.folder(stage))
        self.record["stages"][stage] = before.entry
        self.save()
        self.reporter.note(f"what {stage} had made before is back in its place, and the recipe is as it was")
        return True

    def _take_back_recipe(self) -> None:
        if self._recipe_before is not None:
            write_atomically(self.path / "recipe.yaml", self._recipe_before)
            self._recipe_text = None

    def finish(self, artifact: Artifact, seconds: float) -> None:
        """Notes that a stage is done and what it left."""
        self._before, self._recipe_before, self._finished = None, None, True
        self.stage(artifact.stage).update(
            state="done",
            seconds=round(seconds, 2),
            content=artifact.content,
            files={name: seal(self.path / name, artifact.checksums.get(name)) for name in artifact.files},
            metrics=artifact.metrics,
            facts=artifact.facts,
            disposable=[str(path.relative_to(self.path)) for path in artifact.disposable],
        )
        self.save()
        self._dispose(artifact.stage)

    def _dispose(self, stage: str) -> None:
        """Deletes what a finished stage needs no more, each in one step; run.json names it until it is gone."""
        entry = self.stage(stage)
        for name in entry.pop("disposable", ()):
            path = self.path / name
            doomed = path.with_name(f".{path.name}.tmp")
            for each in (doomed, path):
                if each.exists() and each.resolve().is_relative_to(self.path.resolve()):
                    each = each.rename(doomed) if each is path else each
                    shutil.rmtree(each) if each.is_dir() else each.unlink()
        self.save()

    def note(self, stage: str, **facts: Any) -> None:
        """Keeps something about a stage that is running."""
        self.stage(stage).update(facts)
        self.save()

    def note_state(self, stage: str, state: str, why: str | None = None) -> None:
        """Notes that a stage was stopped or failed, if the disk takes it: why it did is told in any case.

        `why` is kept as the stage's `error` until the stage starts again.
        """
        if entry := self.stage(stage):
            entry.pop("error", None)
            entry |= {"state": state} | ({} if why is None else {"error": why})
            with suppress(OSError):
                self.save()

    def guess(self, key: str, value: Any, source: str) -> None:
        """Tells the user about a value that was chosen for them, and keeps it with its source in run.json."""
        self.reporter.guess(key, str(value), source)
        self.record["guesses"][key] = {"value": value, "source": source}

    def _put_aside(self, stage: str) -> Path | None:
        """Moves a stage's folder out of the way, and says where to: what may have cost hours is kept, an empty start not."""
        folder, entry = self.folder(stage), self.stage(stage)
        worth_keeping = entry.get("state") == "done" or any((folder / "checkpoints").glob("step-*"))
        if not worth_keeping:
            shutil.rmtree(folder)
            return None
        target = self.path / "previous" / f"{stage}-{entry.get('fingerprint', 'unknown')[:8]}"
        number = 1
        while target.exists():
            number += 1
            target = target.with_name(f"{stage}-{entry.get('fingerprint', 'unknown')[:8]}-{number}")
        target.parent.mkdir(exist_ok=True)
        folder.rename(target)
        self.reporter.note(f"what {stage} had made before was moved to {target}")
        return target


def _refuse_foreign(path: Path, name: str) -> None:
    """Raises UsageError when a path is taken by another recipe's run or by anything that is not a run."""
    if path.is_file():
        raise UsageError("the run directory is a file", got=path, expected="a folder", hint="choose another -o")
    if not os.access(path, os.R_OK) and path.exists():
        raise ResourceError("the run directory cannot be read", got=path, hint="choose another -o")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / "run.json").exists():
        begun = (item for item in path.iterdir() if not any(item.match(name) for name in _LEFT))
        if {item.name for item in begun} <= {".lock", "recipe.yaml", "error.log", "launch"}:
            return
        raise UsageError(
            "the folder is not a run directory",
            got=path,
            expected="a new folder or one with a run.json",
            hint="choose another -o",
        )
    owner = read_json(path / "run.json").get("name")
    if owner != name:
        raise UsageError(
            "the run directory belongs to another recipe",
            got=f"recipe `{name}`",
            expected=f"recipe `{owner}`, which made {path}",
            hint="choose another directory with -o, or another name",
            where=path,
        )


def _owner(path: Path) -> str:
    """Who holds a run, as far as run.json tells."""
    try:
        owner = read_json(path / "run.json")["process"]
    except (LlmkitError, KeyError):
        return ""
    return f", by process {owner['pid']} on {owner['host']} since {owner['started']}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _surroundings() -> dict[str, Any]:
    """Versions, hardware and the git commit of the folder that llmkit was started in."""
    versions = {"python": platform.python_version(), "llmkit": __version__}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "versions": versions,
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "memory_bytes": memory},
        "git_commit": _git_commit(),
    }


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _git_commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
