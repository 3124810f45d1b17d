"""What the processes of a training tell each other before a model is loaded, what must be the same, and how fast they talk.

Facts go through the store by which processes find each other, so that they are compared before anything depends on them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch
from torch import distributed

from llmkit import __version__
from llmkit.errors import Problem, ResourceError

_COMPARED = ("torch", "transformers", "accelerate")
_LATE = 10.0  # seconds after which a file that one host wrote is not to be seen on another
_CLOCKS = 5.0  # seconds that clocks may differ by without a word
_TENSOR, _TIMES, _SMALL_TIMES = 4 * 2**20, 2, 20  # bytes of an all-reduce, how often, and how often with one number


@dataclass(frozen=True)
class Facts:
    """One process: where it is, what it has, and what it is about to do."""

    rank: int
    host: str
    pid: int
    versions: dict[str, str]
    device: str
    device_id: str  # of a GPU, wherever it is seen from; empty for a CPU
    free_bytes: int
    recipe: dict[str, Any]  # every key that decides what is made
    sees_folder: bool


@dataclass(frozen=True)
class Speed:
    """How fast all processes add up numbers, and by how many seconds each clock is ahead of the first one's."""

    bytes_a_second: float
    seconds: float  # for one number
    clocks: tuple[float, ...]


def own_facts(rank: int, recipe: Mapping[str, Any], *, sees_folder: bool) -> Facts:
    """What this process has to tell."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "llmkit": __version__}
    versions |= {name: importlib.metadata.version(name) for name in _COMPARED}
    device, device_id, free = "cpu", "", psutil.virtual_memory().available
    if torch.cuda.is_available():
        number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()  # as Accelerate chooses
        about = torch.cuda.get_device_properties(number)
        device, device_id, free = about.name, str(about.uuid), torch.cuda.mem_get_info(number)[0]
    host, pid = socket.gethostname(), os.getpid()
    return Facts(rank, host, pid, versions, device, device_id, free, flattened(recipe), sees_folder)


def compare_all(
    store: Any, rank: int, count: int, recipe: Mapping[str, Any], folder: Path | None, within: timedelta
) -> list[Facts]:
    """The facts of all processes, told through their store.

    Raises ResourceError in each of them, the same one, for what cannot be: other versions, another recipe, a `folder` that
    is not shared, fewer devices than processes.
    """
    token, file = uuid4().hex, None
    try:
        if rank == 0:
            if folder is not None:
                file = folder / f".probe-{token}.tmp"
                file.write_text(token, encoding="ascii")
            store.set("llmkit/token", token)
        told = store.get("llmkit/token").decode()
        sees = folder is None or _is_there(folder / f".probe-{told}.tmp", told)
        mine = own_facts(rank, recipe, sees_folder=sees)
        store.set(f"llmkit/facts/{rank}", json.dumps(asdict(mine)))
        longest = within + timedelta(seconds=_LATE)
        if rank == 0:
            keys = [f"llmkit/facts/{number}" for number in range(count)]
            store.wait(keys, longest)
            found = [Facts(**json.loads(store.get(key))) for key in keys]
            problems = problems_of(found, folder)
            found = [replace(facts, recipe={}) for facts in found]
            store.set("llmkit/found", json.dumps([[asdict(f) for f in found], [vars(p) for p in problems]]))
        else:
            store.wait(["llmkit/found"], 2 * longest)
            all_facts, all_problems = json.loads(store.get("llmkit/found"))
            found, problems = [Facts(**f) for f in all_facts], [Problem(**p) for p in all_problems]
        _wait_until_heard(store, rank, count)
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
    raise_all(problems)
    return found


def _wait_until_heard(store: Any, rank: int, count: int) -> None:
    """The store ends with the first process, which therefore leaves last."""
    store.set(f"llmkit/heard/{rank}", "")
    if rank == 0:
        with suppress(distributed.DistError):  # one that is gone needs to hear nothing
            store.wait([f"llmkit/heard/{number}" for number in range(count)], timedelta(seconds=_LATE))


def _is_there(file: Path, content: str) -> bool:
    """Whether a file comes to be seen here; a network's file system may take some seconds."""
    until = time.monotonic() + _LATE
    while True:
        with suppress(OSError):
            if file.read_text(encoding="ascii") == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def problems_of(found: Sequence[Facts], folder: Path | None = None) -> list[Problem]:
    """All that keeps processes from training together."""
    problems = []
    versions = differences(found, lambda facts: facts.versions)
    if versions:
        hint = "install the same on every host, or start all processes in one environment that they share"
        problems.append(Problem("the processes do not run the same software", versions, "the same versions", hint))
    recipe = differences(found, lambda facts: facts.recipe)
    if recipe:
        hint = "start every process by the same command, with a recipe that all hosts see"
        problems.append(Problem("the processes do not have the same recipe", recipe, "the same keys", hint))
    blind = [facts for facts in found if not facts.sees_folder]
    if blind:
        hint = "put the run directory (-o) on a disk that all hosts see under the same path"
        what, got = "the run directory is not shared", f"not seen by {who(blind)}"
        problems.append(
            Problem(what, got, f"what {who(found[:1])} writes there", hint, None if folder is None else str(folder))
        )
    kinds = {"cpu" if not facts.device_id else "gpu" for facts in found}
    if len(kinds) > 1:
        devices = differences(found, lambda facts: {"device": facts.device})
        hint = "look at the drivers of the hosts without, and at CUDA_VISIBLE_DEVICES"
        problems.append(Problem("some processes have a GPU and others have none", devices, None, hint))
    for device_id in sorted({facts.device_id for facts in found} - {""}):
        sharing = [facts for facts in found if facts.device_id == device_id]
        if len(sharing) > 1:
            hint = "start one process for each GPU, and set LOCAL_RANK to its number on the host"
            problems.append(
                Problem(
                    "there are more processes than GPUs", f"{who(sharing)} share one {sharing[0].device}", None, hint
                )
            )
    return problems


def raise_all(problems: Sequence[Problem]) -> None:
    """Raises ResourceError with all problems, if there are any."""
    if len(problems) == 1:
        raise ResourceError(**vars(problems[0]))
    if problems:
        got = "; ".join(f"{problem.what}: {problem.got}" for problem in problems)
        raise ResourceError("these processes cannot train together", got=got, problems=problems)


def differences(found: Sequence[Facts], read: Callable[[Facts], Mapping[str, Any]], most: int = 4) -> str | None:
    """`torch 2.13.0 (rank 0 on a), 2.12.0 (rank 1 on b)`, of each key that is not the same everywhere; None for none."""
    said = []
    for key in sorted({key for facts in found for key in read(facts)}):
        holders: dict[str, list[Facts]] = {}
        for facts in found:
            holders.setdefault(str(read(facts).get(key)), []).append(facts)
        if len(holders) > 1:
            said.append(f"{key} " + ", ".join(f"{value} ({who(some)})" for value, some in holders.items()))
    more = f"; and {len(said) - most} more" if len(said) > most else ""
    return "; ".join(said[:most]) + more if said else None


def who(some: Sequence[Facts]) -> str:
    """`ranks 0 and 1 on a, rank 2 on b`."""
    parts = []
    for host, here in groupby(sorted(some, key=lambda facts: (facts.host, facts.rank)), lambda facts: facts.host):
        ranks = [str(facts.rank) for facts in here]
        shown = ranks if len(ranks) < 6 else [*ranks[:2], "...", ranks[-1]]
        parts.append(f"rank{'s' * (len(ranks) > 1)} {', '.join(shown)} on {host}")
    return ", ".join(parts)


def flattened(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= flattened(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def unlike(values: Mapping[str, Any] | None, found: Sequence[Facts], group: Any) -> str | None:
    """In what `values` are not the same in all processes that have some, who all call this; None where they are."""
    gathered: list[Any] = [None] * len(found)
    distributed.all_gather_object(gathered, values, group=group)
    telling = [facts for facts in found if gathered[facts.rank] is not None]
    return differences(telling, lambda facts: gathered[facts.rank])


def measure(device: torch.device, group: Any) -> Speed:
    """Adds up some MB, and single numbers, in the default process group, and compares clocks in `group`; in all processes."""
    large = torch.zeros(_TENSOR // 4, device=device)
    distributed.all_reduce(large[:1])  # which connects
    seconds = _timed(large, _TIMES, device)
    small = _timed(large[:1], _SMALL_TIMES, device)
    clocks: list[Any] = [None] * distributed.get_world_size()
    distributed.barrier(group=group)
    distributed.all_gather_object(clocks, time.time(), group=group)
    return Speed(_TENSOR / seconds, small, tuple(clock - clocks[0] for clock in clocks))


def _timed(tensor: torch.Tensor, times: int, device: torch.device) -> float:
    """Seconds of one all-reduce."""
    started = time.perf_counter()
    for _ in range(times):
        distributed.all_reduce(tensor)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / times


def in_words(found: Sequence[Facts], speed: Speed) -> str:
    """`4 processes on 2 hosts, all-reduce 1.2 GB/s, 0.3 ms`."""
    hosts = len({facts.host for facts in found})
    rate = speed.bytes_a_second
    size = f"{rate / 1e9:.1f} GB/s" if rate >= 1e8 else f"{rate / 1e6:.1f} MB/s"
    return f"{len(found)} processes on {hosts} host{'s' * (hosts > 1)}, all-reduce {size}, {speed.seconds * 1e3:.1f} ms"


def wrong_clocks(found: Sequence[Facts], speed: Speed) -> str | None:
    """A warning where clocks are not together; None where they are."""
    off = [facts for facts in found if abs(speed.clocks[facts.rank]) > _CLOCKS]
    if not off:
        return None
    worst = max((speed.clocks[facts.rank] for facts in off), key=abs)
    return f"the clock is off by up to {worst:+.0f} s on {who(off)}: times in logs and of files do not compare"


def rows(found: Sequence[Facts], speed: Speed | None) -> list[tuple[str, ...]]:
    """Rank, host, process, device, free memory, versions and clock of each process, for people."""
    return [
        (
            str(facts.rank),
            facts.host,
            str(facts.pid),
            facts.device,
            f"{facts.free_bytes / 2**30:.1f} GiB",
            ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
            "" if speed is None else f"{speed.clocks[facts.rank]:+.3f} s",
        )
        for facts in found
    ]
