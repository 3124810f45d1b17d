"""How the processes of a distributed run find each other, in bounded time, and what is said when they do not."""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from llmkit.errors import ResourceError

_LOOK = 0.1  # seconds between looks into the store


def connect(within: float, recipe: Mapping[str, Any], folder: Path | None) -> tuple[list[Any], Any, Any]:
    """Starts Accelerate's process group once all processes have come, in `within` seconds, and are found to fit together.

    Gives the facts of each, this one's device, and a group to talk in on CPUs. Raises ResourceError.
    """
    import torch
    from accelerate import PartialState
    from torch import distributed

    from llmkit.stages.probe import compare_all

    limit = timedelta(seconds=within)
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = _first_process(time.monotonic() + within, rank)
    store = _own_part(_store(address, within), rank, count, within)
    _choose_interface(address, store, rank, count)
    found = compare_all(store, rank, count, recipe, folder, limit)
    # Accelerate brings several processes up on CPUs only when it is told that there is nothing else.
    cpu = not torch.cuda.is_available()
    state = PartialState(cpu=cpu, store=store, rank=rank, world_size=count, timeout=limit)
    assert state.num_processes == count, "Accelerate and the launcher count processes differently"
    group = None if cpu else distributed.new_group(backend="gloo", timeout=limit)
    return found, state.device, group


def _first_process(until: float, rank: int) -> tuple[str, int]:
    """The address of the first process, which any other waits for. Raises ResourceError when it does not answer in time."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    started = time.monotonic()
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ResourceError(
            "the host of the first process is not known",
            got=f"{host}: {error.strerror}",
            hint="set MASTER_ADDR to a name or an address of it that this host knows",
            where="MASTER_ADDR",
        ) from None
    while rank:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(5.0, until - time.monotonic()))):
                break
        except OSError as error:
            if time.monotonic() > until:
                raise _no_answer(f"{host}:{port}: {error.strerror or error}", time.monotonic() - started) from None
            time.sleep(0.2)
    return host, port


def _store(address: tuple[str, int], within: float) -> Any:
    """The store through which processes find each other.

    It is waited for in a thread, as PyTorch waits for ever for a stranger at that port, deaf to signals.
    """
    from torch import distributed

    found: list[Any] = []

    def ask() -> None:
        try:
            found.append(next(distributed.rendezvous("env://", timeout=timedelta(seconds=within)))[0])
        except Exception as error:
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    until = time.monotonic() + within + 10
    while asking.is_alive() and time.monotonic() < until:
        asking.join(0.5)
    shown = f"{address[0]}:{address[1]}"
    if not found:
        raise _no_answer(f"something else at {shown}", within)
    if not isinstance(found[0], Exception):
        return found[0]
    words = in_short(found[0])
    if "EADDRINUSE" in words:
        raise ResourceError(
            "the port of the first process is in use",
            got=shown,
            hint="another training may run on this host: set MASTER_PORT to a free port, the same for all processes",
            where="MASTER_PORT",
        ) from found[0]
    if "clients joined" in words:
        raise ResourceError(
            "not all processes have come",
            got=words,
            expected=f"{os.environ['WORLD_SIZE']} of them, as WORLD_SIZE says, within {within:.0f} s (launch.connect_within)",
            hint=f"look at the logs of the others: do they run, and do they reach {shown}?",
        ) from found[0]
    raise _no_answer(f"{shown}: {words}", within) from found[0]


def _own_part(store: Any, rank: int, count: int, within: float) -> Any:
    """A part of the store that only this start of the processes knows: torchrun keeps its store when it starts them again.

    What the first process names may lie there from before; it is meant once it has answered with what was sent to it now.
    """
    from torch import distributed

    own = secrets.token_hex(8)
    if rank == 0:
        store.set("llmkit/part", own)
        for other in range(1, count):
            store.set(f"llmkit/{own}/answer-{other}", store.get(f"llmkit/{own}/{other}"))
        return distributed.PrefixStore(f"llmkit/{own}", store)
    sent_to, until = "", time.monotonic() + within
    while time.monotonic() < until:
        part = store.get("llmkit/part").decode()
        if part != sent_to:
            store.set(f"llmkit/{part}/{rank}", own)
            sent_to = part
        answer = f"llmkit/{part}/answer-{rank}"
        if store.check([answer]) and store.get(answer).decode() == own:
            return distributed.PrefixStore(f"llmkit/{part}", store)
        time.sleep(_LOOK)
    raise _no_answer("nothing in the store that is of this start", within)


def _no_answer(got: str, seconds: float) -> ResourceError:
    return ResourceError(
        "the first process does not answer",
        got=f"{got}, after {seconds:.0f} s",
        expected="an answer within launch.connect_within",
        hint="MASTER_ADDR and MASTER_PORT name its host and a free port there: does it run, and does this host reach it?",
    )


def _choose_interface(address: tuple[str, int], store: Any, rank: int, count: int) -> None:
    """Has gloo use the network that leads to the first process, not the one that this host's own name happens to mean.

    On the first process's host that name may lead nowhere else (127.0.1.1, as Debian has it): there it is the network that
    leads to a process of another host.
    """
    own = _own_address(address)
    store.set(f"address/{rank}", own)
    if _leads_nowhere_else(own):
        others = (store.get(f"address/{other}").decode() for other in range(count))
        elsewhere = next((other for other in others if not _leads_nowhere_else(other)), None)
        own = own if elsewhere is None else _own_address((elsewhere, address[1]))
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _own_address(other: tuple[str, int]) -> str:
    """This host's address on the way to another one; empty where that has no IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:  # sends nothing
        try:
            asked.connect(other)
        except OSError:
            return ""
        found: str = asked.getsockname()[0]
        return found


def _leads_nowhere_else(address: str) -> bool:
    return not address or ipaddress.ip_address(address).is_loopback


def in_short(error: Exception) -> str:
    """A library's words without the place in its source, and without advice."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return re.sub(r"^\[\S+:\d+\] ", "", first).partition(". This is typically")[0]
