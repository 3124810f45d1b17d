"""The processes that `llmkit --processes N` starts, forked from the command itself, which has imported everything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import forked

from llmkit.cli import worker
from llmkit.launch import local


class Worker:
    """In place of subprocess.Popen: a worker's `python -m ...`, forked from a command that has imported it already."""

    def __init__(self, words: list[str], *, env: dict[str, str], stdout: Any, stderr: Any, **rest: Any) -> None:
        assert words[:3] == [sys.executable, "-m", "llmkit.cli.worker"]
        assert rest == {"stdin": subprocess.DEVNULL, "start_new_session": True}
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for target, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), target)
            own = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
            for number in own:
                with suppress(OSError):
                    if number > 2 and not os.get_inheritable(number):
                        os.close(number)
            forked.as_if_started(_work, words[3:], env)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _work(*words: str) -> None:
    sys.argv = ["llmkit", *words]
    worker.main()


def command(*words: str) -> None:
    """The command line, which starts workers so."""
    local.subprocess = SimpleNamespace(Popen=Worker, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    forked.command(*words)
