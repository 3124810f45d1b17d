"""Faults for tests: disks that fail, fill up and tear writes, limits of the system, and death at a chosen file operation."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def lives_until(operation: int, work: Callable[[], Any]) -> bool:
    """Does something in a forked process, which is killed right before its n-th change of files; True when it got to the end.

    `work` must compute nothing with more than one thread.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _die_at(operation)
            work()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), f"it failed by itself, with code {code}"
    return code == 0


def _die_at(operation: int) -> None:
    left = [operation]

    def note() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and (given[2] or 0) & _WRITES):
            note()

    synced = os.fsync

    def sync(file: int) -> None:
        note()
        synced(file)

    os.fsync = sync  # type: ignore[assignment]
    sys.addaudithook(audit)


class FailingDisk:
    """Makes file operations fail while it is on. It counts those of one name, and fails the ones that are `chosen`."""

    def __init__(
        self, patch: pytest.MonkeyPatch, operation: str, error: int = errno.ENOSPC, below: str = "", *, on: bool = True
    ) -> None:
        """`operation` is one of save_file, fsync, rename, replace, mkdir, link, rmtree; `below`: part of the path."""
        self.calls = 0
        self.failures = 0
        self.chosen: Callable[[int], bool] = lambda number: True
        self.on = on
        self._error, self._below = error, below
        for target, name in self._places(operation):
            patch.setattr(target, name, self._failing(getattr(target, name)))

    def _places(self, operation: str) -> list[tuple[Any, str]]:
        from llmkit.run import checkpoint

        return {"save_file": [(checkpoint, "save_file")], "rmtree": [(shutil, "rmtree")]}.get(
            operation, [(os, operation)]
        )

    def _failing(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            if not self.on or (self._below and not any(self._below in str(part) for part in given)):
                return real(*given, **more)
            self.calls += 1
            if self.chosen(self.calls):
                self.failures += 1
                raise OSError(self._error, os.strerror(self._error))
            return real(*given, **more)

        return call


def tearing(save: Callable[..., Any], tear: Callable[[Path], Any], when: Callable[[], bool]) -> Callable[..., Any]:
    """A `save_file` of a disk that says that all is well and has other bytes."""

    def torn(tensors: Any, path: Path, *more: Any) -> None:
        save(tensors, path, *more)
        if when():
            tear(path)

    return torn


def flip(path: Path, place: float = 0.9) -> None:
    """Turns one bit of a file over."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= 1
    path.write_bytes(data)


@contextmanager
def limited(kind: int, value: int) -> Iterator[None]:
    """A limit of the system on this process, such as resource.RLIMIT_FSIZE."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def on_small_disk(folder: Path, megabytes: float, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a shell script in a mount namespace of its own with a tmpfs of that size at `folder`. `$@` are the arguments.

    Skips the test where that is not permitted.
    """
    folder.mkdir(exist_ok=True)
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("no file systems can be mounted here, not even in a namespace")
    mount = f'mount -t tmpfs -o size={int(megabytes * 1024)}k none "{folder}" && '
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + script, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def last_json(text: str) -> dict[str, Any]:
    """The JSON object in the last line of what a command wrote."""
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found
