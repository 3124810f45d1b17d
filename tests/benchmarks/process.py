"""Runs a command in a process of its own and tells what it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_TAIL_LINES = 15  # of standard error, when a process fails


class ProcessError(Exception):
    """A process that failed; says how, with the end of what it wrote."""


@dataclass(frozen=True)
class Finished:
    """A process that ended well.

    `answer` is the JSON on its last line of standard output; `other_cpu_seconds` is what all other programs of the
    machine used meanwhile, None where the system does not tell.
    """

    answer: dict[str, Any]
    seconds: float
    cpu_seconds: float
    other_cpu_seconds: float | None
    peak_memory_bytes: int


def run_module(module: str, *arguments: object, folder: Path, environment: Mapping[str, str] | None = None) -> Finished:
    """Runs `python -m module` and waits for it; what it writes is kept in `folder`.

    The peak memory is the largest resident size of the process or of any that it waited for. Raises ProcessError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    with out.open("w") as stdout, err.open("w") as stderr:
        started, busy_before = time.perf_counter(), _busy_seconds()
        process = subprocess.Popen(
            command, stdout=stdout, stderr=stderr, cwd=ROOT, env=_environment(folder) | dict(environment or {})
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds, busy = time.perf_counter() - started, _busy_seconds()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise ProcessError(_failure(command, process.returncode, out, err))
    used = usage.ru_utime + usage.ru_stime
    other = max(0.0, busy - busy_before - used) if busy is not None and busy_before is not None else None
    unit = 1 if sys.platform == "darwin" else 1024
    return Finished(_last_json(command, out), seconds, used, other, usage.ru_maxrss * unit)


def lines_of(command: Sequence[str]) -> list[str]:
    """What a short command prints, or nothing where there is no such command."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return found.stdout.splitlines()


def _busy_seconds() -> float | None:
    """Processor time that this machine has used since it started: all but the idle and waiting time of /proc/stat."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")


def _environment(folder: Path) -> dict[str, str]:
    """No look-ups on a hub, one GPU at most, and nothing kept by Datasets from one run to the next."""
    fixed = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str((folder / "datasets").resolve())}
    return {"CUDA_VISIBLE_DEVICES": "0"} | dict(os.environ) | fixed


def _last_json(command: Sequence[str], out: Path) -> dict[str, Any]:
    lines = out.read_text(encoding="utf-8").splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        raise ProcessError(f"{' '.join(command)}\ndid not end with a line of JSON: see {out}") from None
    return answer


def _failure(command: Sequence[str], code: int, out: Path, err: Path) -> str:
    written = [line for file in (out, err) for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    return "\n".join([f"{' '.join(command)}", f"ended with {code}; {err}:", *written[-_TAIL_LINES:]])
