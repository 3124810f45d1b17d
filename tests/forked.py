"""Processes for tests that need many: forked from one that has imported everything and computed nothing.

A start of `python -m llmkit` imports for seconds; a fork is there at once. Each process is a session of its own, with the
system's own answers to signals and its output in files, and does with its environment what a fresh one would.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONG = 900.0  # seconds: longer than anything takes on a machine that is slow and busy
PRELOADED = (
    *("accelerate", "transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2", "peft"),
    *(f"llmkit.stages.{name}" for name in ("preprocess", "pretrain", "freeze", "finetune", "evaluate", "export")),
    *(f"llmkit.{name}" for name in ("cli.app", "cli.stages", "cli.recipes", "cli.console", "stages.pipeline")),
    *(f"llmkit.tasks.{name}" for name in ("text", "chat", "classify")),
    *("sacrebleu", "sklearn.metrics", "torch.distributed", "transformers.masking_utils", "pytest"),
)
_SURROUNDINGS = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1"}
_CONTEXT = multiprocessing.get_context("forkserver")
_STARTED: weakref.WeakSet[Forked] = weakref.WeakSet()


@dataclass(eq=False)
class Forked:
    """A process that was started, much like subprocess.Popen."""

    process: Any
    stdout: Path
    stderr: Path

    @property
    def pid(self) -> int:
        found: int = self.process.pid
        return found

    @property
    def returncode(self) -> int | None:
        """Minus the signal's number when one ended it."""
        code: int | None = self.process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = LONG) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.process.name), timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ended just now
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def out(self) -> str:
        """What it wrote on standard output, so far."""
        return self.stdout.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        """What it wrote on standard error, so far."""
        return self.stderr.read_text(encoding="utf-8", errors="replace")


def start(
    function: Callable[..., Any],
    *arguments: Any,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdout: Path | None = None,
    stderr: Path | None = None,
) -> Forked:
    """Calls a function of a module in a process of its own, whose exit code is 0 or what `sys.exit` was told."""
    files = [given or Path(tempfile.mkstemp(prefix="forked-", dir=_folder())[1]) for given in (stdout, stderr)]
    for file in files:
        file.write_bytes(b"")
    _start_server()
    surroundings = os.environ | _SURROUNDINGS | dict(env or {})
    about = (function, arguments, dict(surroundings), cwd or Path.cwd(), *files)
    process = _CONTEXT.Process(target=_become, args=about, name=function.__name__)
    process.start()
    found = Forked(process, *files)
    _STARTED.add(found)
    return found


def llmkit(*words: object, **more: Any) -> Forked:
    """Starts `llmkit WORDS`; takes what `start` takes."""
    return start(command, *map(str, words), **more)


def ranks(count: int) -> list[dict[str, str]]:
    """What a launcher tells each of so many processes, in its environment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def wait_for_all(processes: Sequence[Forked]) -> None:
    """Raises AssertionError with what it said when one of them ends with anything but 0; the others end then, too."""
    try:
        left = list(processes)
        while left:
            multiprocessing.connection.wait([one.process.sentinel for one in left], LONG)
            ended = [one for one in left if one.poll() is not None]
            assert ended, f"still at work after {LONG:g} s: " + left[0].err[-3000:]
            for one in ended:
                assert one.returncode == 0, f"{one.returncode}: " + one.err[-3000:]
            left = [one for one in left if one.poll() is None]
    finally:
        for one in processes:
            one.kill()
            one.wait()


def wait_until(true: Callable[[], bool], *processes: Forked) -> None:
    """Waits for a state that processes which go on bring about."""
    deadline = time.monotonic() + LONG
    while not true():
        for process in processes:
            assert process.poll() is None, f"it ended with {process.returncode}: {process.err[-3000:]}"
        assert time.monotonic() < deadline, [process.err[-3000:] for process in processes]
        time.sleep(0.02)


def locate_without_deepspeed(uri: str) -> None:
    """Brings a model to the cache, without what DeepSpeed says of the machine once Transformers has imported it."""
    from llmkit.model.location import locate

    logging.getLogger("DeepSpeed").addFilter(lambda record: False)
    locate(uri)


def command(*words: str) -> None:
    """The command line, in this process."""
    from llmkit.cli.app import main

    sys.argv = ["llmkit", *words]
    main()


def _become(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: Mapping[str, str],
    cwd: Path,
    stdout: Path,
    stderr: Path,
) -> None:
    os.setsid()
    for target, file in ((0, Path(os.devnull)), (1, stdout), (2, stderr)):
        opened = os.open(file, os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, target)
        os.close(opened)
    os.chdir(cwd)
    as_if_started(function, arguments, environment)


def as_if_started(function: Callable[..., Any], arguments: Sequence[Any], environment: Mapping[str, str]) -> None:
    """Makes a forked process one that was started anew, but for what it has open, and that ends with the function."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        function(*arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _start_server() -> None:
    from multiprocessing import forkserver

    before = dict(os.environ)
    os.environ.update(_SURROUNDINGS)  # some of it is read by what is imported
    try:
        _CONTEXT.set_forkserver_preload(list(PRELOADED))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def _folder() -> str:
    if not _FOLDERS:
        _FOLDERS.append(tempfile.TemporaryDirectory(prefix="forked-"))
    return _FOLDERS[0].name


@atexit.register
def _end_all() -> None:
    """Before multiprocessing waits for them at exit."""
    for one in list(_STARTED):
        one.kill()
