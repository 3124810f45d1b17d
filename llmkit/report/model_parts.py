"""A model as a row of parts, read from the names of its parameters: what comes before the blocks, the blocks, what follows."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_NUMBERED = re.compile(r"^((?:[^.\d][^.]*\.)+)(\d+)\.")
_LONGEST_HEADER = 100 << 20  # bytes; as safetensors has it
_PREFIX = "base_model.model."  # of the names in PEFT's files
STILL, LEARNS, THAWS, MIXED = "stands still", "learns", "thaws", "in part"
ADAPTED = "stands still, adapters learn beside it"


@dataclass(frozen=True)
class Part:
    """A block (`number` in its stack), or what stands beside the stacks; `parameters` are None where nothing tells them."""

    name: str
    stack: str | None
    number: int
    tensors: int
    state: str
    parameters: int | None
    thaws_at: str | None = None


@dataclass(frozen=True)
class Adapters:
    """What learns where adapters do: those beside some modules, by path, and some parameters of the model's own, by name.

    Their sizes are None before fine-tuning is done.
    """

    beside: frozenset[str]
    own: frozenset[str]
    parameters: int | None = None
    own_parameters: int | None = None


def read_adapters(folder: Path) -> Adapters | None:
    """What a folder of adapters holds; None where there are none."""
    sizes = {name.removeprefix(_PREFIX): size for name, size in parameter_sizes([folder]).items()}
    if not sizes:
        return None
    own = {name: size for name, size in sizes.items() if ".lora_" not in name}
    beside = frozenset(name.partition(".lora_")[0] for name in sizes if name not in own)
    return Adapters(beside, frozenset(own), sum(sizes.values()) - sum(own.values()), sum(own.values()))


def planned_adapters(plan: Mapping[str, Any]) -> Adapters:
    """What is to learn by a freeze plan: adapters in blocks that it leaves free, and what it leaves free beside blocks."""
    stacks = _stacks([*plan["frozen"], *plan["trainable"]])
    inside = {name for name in plan["trainable"] if (found := _NUMBERED.match(name)) and found[1] in stacks}
    return Adapters(frozenset(map(_module, inside)), frozenset(plan["trainable"]) - inside)


def model_parts(plan: Mapping[str, Any], sizes: Mapping[str, int], adapters: Adapters | None = None) -> list[Part]:
    """The parts of the model of a freeze plan, in the order of its parameters."""
    frozen, trainable = list(plan["frozen"]), list(plan["trainable"])
    thaws = {name: str(thaw["at"]) for thaw in plan.get("thaws", []) for name in thaw["names"]}
    names = _in_order(frozen, trainable)
    states_of = _states(plan, adapters)
    grouped: dict[tuple[str | None, int, str], list[str]] = defaultdict(list)
    stacks = _stacks(names)
    for name in names:
        found = _NUMBERED.match(name)
        if found and found[1] in stacks:
            stack = found[1].rstrip(".")
            grouped[stack, int(found[2]), f"{stack}.{found[2]}"].append(name)
        else:
            grouped[None, 0, _beside(name)].append(name)
    parts = []
    for (group, number, title), members in grouped.items():
        states = {states_of[name] for name in members}
        counts = [sizes.get(name) for name in members]
        parts.append(
            Part(
                name=title,
                stack=group,
                number=number,
                tensors=len(members),
                state=ADAPTED if ADAPTED in states else states.pop() if len(states) == 1 else MIXED,
                parameters=None if None in counts else sum(count or 0 for count in counts),
                thaws_at=next((thaws[name] for name in members if name in thaws), None),
            )
        )
    return parts


def _states(plan: Mapping[str, Any], adapters: Adapters | None) -> dict[str, str]:
    """What becomes of each parameter."""
    names = [*plan["frozen"], *plan["trainable"]]
    if adapters is not None:
        still = {name: ADAPTED if _module(name) in adapters.beside else STILL for name in names}
        return still | {name: LEARNS for name in names if name in adapters.own}
    found = dict.fromkeys(plan["frozen"], STILL) | dict.fromkeys(plan["trainable"], LEARNS)
    return found | {name: THAWS for thaw in plan.get("thaws", []) for name in thaw["names"]}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def runs_of(parts: Sequence[Part]) -> list[tuple[str, str, int, int | None]]:
    """Neighbouring blocks of one state together: what, state, tensors, parameters."""
    found: list[tuple[list[Part], str]] = []
    for part in parts:
        state = f"{part.state} at {_when(part.thaws_at)}" if part.state == THAWS else part.state
        last = found[-1] if found else None
        if last and part.stack and last[0][-1].stack == part.stack and last[1] == state:
            last[0].append(part)
        else:
            found.append(([part], state))
    rows = []
    for members, state in found:
        first, last_part = members[0], members[-1]
        what = first.name
        if first.stack:
            span = f"{first.number}" if len(members) == 1 else f"{first.number}\u2013{last_part.number}"
            what = f"block{'' if len(members) == 1 else 's'} {span} ({first.stack})"
        counts = [part.parameters for part in members]
        total = None if None in counts else sum(count or 0 for count in counts)
        rows.append((what, state, sum(part.tensors for part in members), total))
    return rows


def parameter_sizes(folders: Sequence[Path]) -> dict[str, int]:
    """Scalars by parameter name, from the headers of the safetensors files of the first folder that has any."""
    for folder in folders:
        sizes: dict[str, int] = {}
        for file in sorted(folder.glob("*.safetensors")):
            sizes |= _header(file)
        if sizes:
            return sizes
    return {}


def _header(file: Path) -> dict[str, int]:
    """Names and sizes of a safetensors file's tensors; nothing of a file that is none."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= _LONGEST_HEADER:
            return {}
        try:
            header = json.loads(opened.read(length))
            return {name: prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}


def _in_order(frozen: list[str], trainable: list[str]) -> list[str]:
    """All names as the model has them. The plan keeps that order within each of its lists, which are merged by place."""
    places = {name: place for place, name in enumerate([*frozen, *trainable])}

    stacks: dict[str, int] = {}
    for name in places:
        if found := _NUMBERED.match(name):
            stacks.setdefault(found[1], len(stacks) + (len(places) if "decoder" in found[1] else 0))

    def place(name: str) -> tuple[int, int, int, int]:
        found = _NUMBERED.match(name)
        if found is None:
            return (0 if _leads_in(name) else 2), 0, 0, places[name]
        return 1, stacks[found[1]], int(found[2]), places[name]

    return sorted(places, key=place)


def _leads_in(name: str) -> bool:
    return bool(re.search(r"emb|wte|wpe|shared|patch|rel_pos|relative_attention|token_type|front", name))


def _stacks(names: Sequence[str]) -> set[str]:
    """The beginnings of names that a number follows, of at least two numbers."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if found := _NUMBERED.match(name):
            numbers[found[1]].add(found[2])
    return {stack for stack, found in numbers.items() if len(found) > 1}


def _beside(name: str) -> str:
    """What a parameter outside the blocks belongs to: its first two names."""
    return ".".join(name.split(".")[:-1][:2]) or name


def _when(at: str | None) -> str:
    return f"step {at}" if at and at.isdigit() else f"{at} of the steps"
