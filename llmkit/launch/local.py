"""One stage in several processes of this machine, one for each GPU: started, watched, and ended together.

Each process finds the others as under torchrun, by RANK, WORLD_SIZE and MASTER_ADDR, and leaves its error in the file that
TORCHELASTIC_ERROR_FILE names, as PyTorch's own launcher has it. When this one is killed, they save and stop by themselves.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from llmkit.errors import KINDS, InterruptedByUserError, LlmkitError, ResourceError, StoppedError
from llmkit.recipe.schema import Recipe
from llmkit.recipe.values import seconds_of

_GRACE = 15.0  # seconds that the others have once one has failed: they wait for it in vain
_LOOK = 0.1  # seconds between looks
_STOPPED = (StoppedError.exit_code, InterruptedByUserError.exit_code)
_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_BEATS = ".beat-*"


def processes_for(recipe: Recipe) -> int:
    """How many processes to start: one for each GPU, or as many as the recipe says; 1 under a launcher.

    Raises ResourceError for more GPUs than there are.
    """
    if "WORLD_SIZE" in os.environ:
        return 1
    import torch

    keys, there = recipe.launch, torch.cuda.device_count()
    if keys.gpus is not None and keys.gpus > there:
        raise ResourceError(
            "there are not so many GPUs",
            got=f"{there} on this machine",
            expected=f"{keys.gpus}, as launch.gpus says",
            hint="lower --gpus, or use --processes on a CPU",
        )
    return keys.gpus or keys.processes or max(there, 1)


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    error_file: Path
    output: Path | None  # what it said, of all but the first
    killed: bool = False  # by us

    @property
    def told_at(self) -> float | None:
        """When it told of its error."""
        return self.error_file.stat().st_mtime if self.error_file.exists() else None


@dataclass
class Launcher:
    """Runs `llmkit ARGUMENTS` in so many processes. The first one's progress is shown, the others' kept back.

    Each process touches `beats/.beat-RANK` with every step; when none does for `hang_after`, all are ended.
    """

    processes: int
    hang_after: str
    beats: Path

    def run(self, arguments: Sequence[str]) -> None:
        """Raises the error of the process that failed first; StoppedError and the like too."""
        for old in self.beats.glob(_BEATS):
            old.unlink()
        ranks: list[_Rank] = []
        with tempfile.TemporaryDirectory(prefix="llmkit-") as folder, _signals_passed_on(ranks):
            port = _free_port()
            try:
                for number in range(self.processes):
                    ranks.append(self._start(number, port, arguments, Path(folder)))
                self._watch(ranks)
            finally:
                _kill(ranks)
            failed = [rank for rank in ranks if rank.process.returncode]
            if failed:
                raise self._cause(failed)

    def _start(self, number: int, port: int, arguments: Sequence[str], folder: Path) -> _Rank:
        error_file, output = folder / f"error-{number}.json", folder / f"output-{number}" if number else None
        places = {
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": self.processes,
            "LOCAL_WORLD_SIZE": self.processes,
        }
        own = {name: str(value) for name, value in places.items()}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_ERROR_FILE": str(error_file)}
        threads = str(max(1, (os.cpu_count() or 1) // self.processes))
        with (output or Path(os.devnull)).open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "llmkit.cli.worker", str(os.getpid()), *arguments],
                env={"OMP_NUM_THREADS": threads} | os.environ | own,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out if output else None,
                start_new_session=True,  # so that Ctrl-C comes once, from us
            )
        return _Rank(number, process, error_file, output)

    def _watch(self, ranks: list[_Rank]) -> None:
        """Waits until all have ended; once one has failed or none gets on, the others are ended soon."""
        failed_at = None
        while None in [rank.process.poll() for rank in ranks]:  # all of them: each tells its end only when asked
            if failed_at is None and any(rank.process.returncode for rank in ranks):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > _GRACE:
                _kill(ranks)
            self._refuse_to_hang(ranks)
            time.sleep(_LOOK)

    def _refuse_to_hang(self, ranks: list[_Rank]) -> None:
        """Raises ResourceError when no process has finished a step for too long."""
        try:
            files = [self.beats / f".beat-{rank.number}" for rank in ranks]
            if time.time() - max(file.stat().st_mtime for file in files) < seconds_of(self.hang_after):
                return
            states = [psutil.Process(rank.process.pid).status() for rank in ranks]
            found = ", ".join(f"{n}: step {file.read_text()}, {states[n]}" for n, file in enumerate(files))
        except (FileNotFoundError, psutil.NoSuchProcess):  # one has not begun to train, or is at its end
            return
        _kill(ranks)
        raise ResourceError(
            "training hangs: no process has finished a step in time",
            got=f"processes {found}",
            expected=f"a step within {self.hang_after} (launch.hang_after)",
            hint="look at that process's device and network; the same command goes on from the last checkpoint",
        )

    def _cause(self, failed: list[_Rank]) -> LlmkitError:
        """The error of the process that failed first; the others' are but its consequences."""
        told = [rank for rank in failed if rank.told_at is not None]
        died = [rank for rank in failed if rank.told_at is None and not rank.killed]
        if told and not died:
            worse = [rank for rank in told if rank.process.returncode not in _STOPPED]
            return _read_error(min(worse, key=lambda rank: rank.told_at or 0.0) if worse else told[0])
        first = (died or failed)[0]
        code = first.process.returncode or 0
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        said = first.output.read_text(errors="replace").strip().splitlines()[-3:] if first.output else []
        return ResourceError(
            f"process {first.number} of {self.processes} died",
            got="; ".join([name, *said]),
            hint="SIGKILL is often a system's answer to too little memory; the same command goes on from the last checkpoint",
        )


def _kill(ranks: Sequence[_Rank]) -> None:
    """Ends what still runs, at once."""
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.kill()
            rank.killed = True
    for rank in ranks:
        rank.process.wait()


@contextmanager
def _signals_passed_on(ranks: Sequence[_Rank]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _read_error(rank: _Rank) -> LlmkitError:
    """The error that a process left, of its own kind."""
    fields = json.loads(rank.error_file.read_text(encoding="utf-8"))["llmkit"]
    kind = KINDS.get(fields.pop("kind"), LlmkitError)
    what = fields.pop("what")
    return kind(f"process {rank.number}: {what}" if rank.number else what, **fields)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
