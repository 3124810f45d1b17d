"""Who started this process: under Slurm's `srun`, PyTorch's variables are set from Slurm's own, as torchrun would."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, MutableMapping

from llmkit.errors import UsageError

_FIRST_PORT, _PORTS = 15_000, 15_000  # below those that systems hand out themselves
_PART = re.compile(r"\[([^\]]*)\]|([^\[\],]+)")
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def recognise(environment: MutableMapping[str, str] | None = None) -> None:
    """Sets RANK, WORLD_SIZE and their kind in a task of a step of several; leaves alone what is set already.

    Only a step that `srun` started has them: a batch script's own shell has SLURM_PROCID too, and no other ranks.
    Raises UsageError when Slurm's variables contradict each other. https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
    """
    env = os.environ if environment is None else environment
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in env or "SLURM_STEP_ID" not in env or tasks == "1":
        return
    try:
        rank, local, node = (int(env[name]) for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"))
        job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
        on_nodes = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
        first = first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
        consistent = rank < int(tasks) == sum(on_nodes) and local < on_nodes[node]
    except (KeyError, ValueError, IndexError) as error:
        raise _no_step_of_srun(str(error)) from None
    if not consistent:
        raise _no_step_of_srun(f"rank {rank} of {tasks} tasks, of which {on_nodes} on the nodes")
    env["RANK"], env["LOCAL_RANK"] = str(rank), str(local)
    env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"] = tasks, str(on_nodes[node])
    env.setdefault("MASTER_ADDR", first)
    env.setdefault("MASTER_PORT", str(_FIRST_PORT + (job * 31 + step) % _PORTS))


def check_place(environment: Mapping[str, str] | None = None) -> None:
    """Raises UsageError when what a launcher says of this process's place among others makes no sense."""
    env = os.environ if environment is None else environment
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if name in env:
            if not env[name].isascii() or not env[name].isdigit():
                raise _no_place(f"{name} is `{env[name]}`", "a whole number", name)
            numbers[name] = int(env[name])
    count, rank = numbers.get("WORLD_SIZE", 1), numbers.get("RANK", 0)
    if not rank < count:
        raise _no_place(
            f"RANK is {rank}, and WORLD_SIZE {env.get('WORLD_SIZE', 'is not set')}", "ranks from 0 on", "RANK"
        )
    if not numbers.get("LOCAL_RANK", 0) < numbers.get("LOCAL_WORLD_SIZE", count) <= count:
        got = ", ".join(f"{name} is {value}" for name, value in numbers.items() if name != "MASTER_PORT")
        raise _no_place(got, "LOCAL_RANK below LOCAL_WORLD_SIZE, which is WORLD_SIZE at most", "LOCAL_RANK")
    if count == 1:
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise _no_place(f"WORLD_SIZE is {count}, and {name} is not set", "all of them, or none", name)
    if not 0 < numbers["MASTER_PORT"] < 2**16:
        raise _no_place(f"MASTER_PORT is {numbers['MASTER_PORT']}", "a port from 1 to 65535", "MASTER_PORT")


def first_host(nodes: str) -> str:
    """The first name of Slurm's `gpu[003-008,12],cpu1`. Raises ValueError."""
    name, end = "", 0
    for match in _PART.finditer(nodes):
        if match.start() != end:
            break
        ranges, plain = match.groups()
        name += plain if ranges is None else ranges.split(",")[0].split("-")[0]
        end = match.end()
    if not name or (end < len(nodes) and nodes[end] != ","):
        raise ValueError(f"no list of nodes: {nodes}")
    return name


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` as [2, 2, 2, 1]. Raises ValueError."""

    def counts() -> Iterator[int]:
        for part in text.split(","):
            match = _COUNT.fullmatch(part)
            if match is None:
                raise ValueError(f"no number of tasks: {part}")
            yield from [int(match[1])] * int(match[2] or 1)

    return list(counts())


def _no_place(got: str, expected: str, where: str) -> UsageError:
    return UsageError(
        "the environment does not tell which of several processes this is",
        got=got,
        expected=expected,
        hint="start it with torchrun, `accelerate launch` or srun, which set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
        "MASTER_PORT; or unset them for one process",
        where=where,
    )


def _no_step_of_srun(got: str) -> UsageError:
    return UsageError(
        "Slurm's variables do not tell which process this is",
        got=got,
        expected="a step started by srun, with SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_TASKS_PER_NODE and their kind",
        hint="start it with `srun`, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT",
    )
