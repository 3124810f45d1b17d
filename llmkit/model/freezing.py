"""Freezing as data: rules are resolved against a model's anatomy into a plan, and the plan is applied later.

Planning needs names and shapes only, so a model on the meta device will do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from llmkit.errors import ArtifactError, Problem, RecipeError, did_you_mean
from llmkit.model.anatomy import Anatomy, read_anatomy

REGEX_PREFIX = "re:"
GRAMMAR = '"0-19", "0-3,8,10-11", "all", "all but the last 4" or "none"'


@dataclass(frozen=True)
class FreezeRules:
    """What a recipe says shall stand still. `patterns` are globs over parameter names, or `re:` and a regex."""

    blocks: str | None = None
    embeddings: bool = False
    head: bool = False
    norms: bool = False
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class FreezePlan:
    """Which parameters stand still, why, and how much that is. Counts are of scalars."""

    frozen: tuple[str, ...]
    trainable: tuple[str, ...]
    reasons: dict[str, str]  # rule -> what it covers, such as "blocks 0-19" -> "20 blocks, 70,802,880 parameters"
    notes: tuple[str, ...]
    frozen_count: int
    trainable_count: int
    frozen_prefix_blocks: int  # leading blocks of the first stack that, with all that leads into them, stand still

    def to_json(self) -> dict[str, Any]:
        """The plan as freeze.json holds it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> FreezePlan:
        """The plan that `to_json` wrote. Raises ArtifactError when keys are missing, unknown or of the wrong type."""
        kinds = {"tuple": list, "dict": dict, "int": int}
        expected = {field.name: kinds[str(field.type).partition("[")[0]] for field in fields(FreezePlan)}
        given = value if isinstance(value, dict) else {}
        wrong = [key for key, kind in expected.items() if not isinstance(given.get(key), kind)]
        wrong += [key for key in given if key not in expected]
        if wrong:
            raise ArtifactError(
                "a freeze plan is damaged",
                got="wrong or missing: " + ", ".join(wrong),
                hint="run `llmkit freeze` again",
            )
        plan: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in given.items()}
        return FreezePlan(**plan)


def plan_freeze(model: nn.Module, rules: FreezeRules) -> FreezePlan:
    """Which parameters the rules freeze; tied weights are one tensor and stand still together.

    Raises RecipeError, with every mistake at once, for a block that does not exist, a rule or pattern that matches
    nothing, and rules that leave nothing to train.
    """
    anatomy = read_anatomy(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matches, problems = _resolve(rules, anatomy, list(sizes))
    _raise_all(problems)
    canonical = {alias: name for name, aliases in anatomy.tied.items() for alias in aliases}
    named = {name for matched in matches.values() for name in matched[1]}
    stands_still = {canonical.get(name, name) for name in named}
    frozen = tuple(name for name in sizes if name in stands_still)
    trainable = tuple(name for name in sizes if name not in stands_still)
    if not trainable:
        raise RecipeError(
            "everything would be frozen, so that nothing is left to train",
            got=", ".join(matches),
            expected="at least one parameter that moves",
            hint="freeze fewer blocks, or leave the head trainable",
            where="freeze",
        )
    reasons = {}
    for rule, (what, matched) in matches.items():
        scalars = sum(sizes[name] for name in {canonical.get(name, name) for name in matched})
        reasons[rule] = f"{what}, {_counted(scalars, 'parameter')}"
    return FreezePlan(
        frozen=frozen,
        trainable=trainable,
        reasons=reasons,
        notes=_tied_notes(anatomy, named, stands_still),
        frozen_count=sum(sizes[name] for name in frozen),
        trainable_count=sum(sizes[name] for name in trainable),
        frozen_prefix_blocks=_frozen_prefix(anatomy, stands_still),
    )


def apply_freeze(model: nn.Module, plan: FreezePlan) -> None:
    """Sets `requires_grad` as the plan says. Raises ArtifactError, changing nothing, when the plan is another model's."""
    names = {name for name, _ in model.named_parameters()}
    planned = {*plan.frozen, *plan.trainable}
    for what, odd in (("the model has no", planned - names), ("the plan says nothing of", names - planned)):
        if odd:
            raise ArtifactError(
                "the freeze plan belongs to another model",
                got=f"{what} {_some(sorted(odd))}",
                hint="run `llmkit freeze` again for this model",
            )
    frozen = set(plan.frozen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _resolve(
    rules: FreezeRules, anatomy: Anatomy, names: list[str]
) -> tuple[dict[str, tuple[str, list[str]]], list[Problem]]:
    """Each rule -> what it covers, in words, and the parameters it names; and every mistake in the rules."""
    matches: dict[str, tuple[str, list[str]]] = {}
    problems: list[Problem] = []
    if rules.blocks is not None:
        try:
            numbers = _parse_blocks(rules.blocks, anatomy)
        except RecipeError as error:
            problems.extend(error.problems)
        else:
            covered = [name for number in numbers for name in anatomy.blocks[number]]
            matches[f"blocks {rules.blocks.strip()}"] = (_counted(len(numbers), "block"), covered)
    aliases = [alias for others in anatomy.tied.values() for alias in others]
    parts: dict[str, tuple[bool, Iterable[str]]] = {
        "embeddings": (rules.embeddings, anatomy.embeddings),
        "head": (rules.head, (*anatomy.head, *anatomy.tied_head)),
        "norms": (rules.norms, anatomy.norms),
    }
    for part, (wanted, covers) in parts.items():
        covered = list(covers)
        if wanted and not covered:
            problems.append(Problem(f"this model has no {part}", hint=f"leave out `{part}`", where=f"freeze.{part}"))
        elif wanted:
            matches[part] = (_counted(len(covered), "tensor"), covered)
    for pattern in rules.patterns:
        try:
            matching = _matcher(pattern)
        except re.error as error:
            problems.append(
                Problem("a pattern is not a regular expression", pattern, hint=str(error), where="freeze.patterns")
            )
            continue
        covered = [name for name in (*names, *aliases) if matching(name)]
        if covered:
            matches[f"pattern {pattern}"] = (_counted(len(covered), "tensor"), covered)
        else:
            problems.append(_nothing_matches(pattern, [*names, *aliases]))
    return matches, problems


def _matcher(pattern: str) -> Callable[[str], bool]:
    if pattern.startswith(REGEX_PREFIX):
        expression = re.compile(pattern.removeprefix(REGEX_PREFIX))
        return lambda name: expression.fullmatch(name) is not None
    return lambda name: fnmatchcase(name, pattern)


def _nothing_matches(pattern: str, names: list[str]) -> Problem:
    close = difflib.get_close_matches(pattern.removeprefix(REGEX_PREFIX), names, n=3, cutoff=0.3)
    return Problem(
        "a pattern matches no parameter",
        got=pattern,
        expected="a glob over parameter names, or `re:` and a regular expression for whole names",
        hint="the closest names are " + ", ".join(close) if close else "the first names are " + _some(names),
        where="freeze.patterns",
    )


def _parse_blocks(text: str, anatomy: Anatomy) -> list[int]:
    """The block numbers that `text` names, in order."""
    count = len(anatomy.blocks)
    words = " ".join(text.lower().split())
    if words == "none":
        return []
    if count == 0:
        raise _blocks_error("this model has no blocks", text, anatomy)
    if words == "all":
        return list(range(count))
    if last := re.fullmatch(r"all but the last(?: (\d+))?", words):
        kept = int(last[1] or 1)
        if not 0 < kept < count:
            raise _blocks_error(
                "there are not so many blocks" if kept else "`last 0` leaves nothing out", text, anatomy
            )
        return list(range(count - kept))
    numbers: list[int] = []
    for part in words.split(","):
        span = re.fullmatch(r"(\d+)(?: ?- ?(\d+))?", part.strip())
        if span is None:
            raise _blocks_error("blocks cannot be read", text, anatomy)
        first, end = int(span[1]), int(span[2] or span[1])
        if first > end:
            raise _blocks_error(f"the range `{part.strip()}` runs backwards", text, anatomy)
        if end >= count:
            raise _blocks_error(f"there is no block {end}", text, anatomy)
        if set(numbers) & set(range(first, end + 1)):
            raise _blocks_error(f"`{part.strip()}` overlaps a range before it", text, anatomy)
        numbers.extend(range(first, end + 1))
    return sorted(numbers)


def _blocks_error(what: str, text: str, anatomy: Anatomy) -> RecipeError:
    count = len(anatomy.blocks)
    stacks = " and ".join(f"{number} in {name}" for name, number in anatomy.stacks)
    has = f"the model has {_counted(count, 'block')}" + (f", 0 to {count - 1} ({stacks})" if count else "")
    hint = did_you_mean(text, ["all", "none", "all but the last"])
    return RecipeError(what, got=text, expected=f"{GRAMMAR}; {has}", hint=hint, where="freeze.blocks")


def _tied_notes(anatomy: Anatomy, named: set[str], stands_still: set[str]) -> tuple[str, ...]:
    """A line for each name that stands still only because it is another name for a frozen tensor."""
    notes = []
    for name, aliases in anatomy.tied.items():
        if name not in stands_still:
            continue
        group = (name, *aliases)
        cause = next(item for item in group if item in named)
        notes += [f"{item} is tied to {cause}: it stands still with it" for item in group if item not in named]
    return tuple(notes)


def _frozen_prefix(anatomy: Anatomy, frozen: set[str]) -> int:
    if not frozen.issuperset(anatomy.embeddings) or not anatomy.stacks:
        return 0
    first_stack = anatomy.blocks[: anatomy.stacks[0][1]]
    return next((number for number, block in enumerate(first_stack) if not frozen.issuperset(block)), len(first_stack))


def _raise_all(problems: list[Problem]) -> None:
    if problems:
        first = problems[0]
        raise RecipeError(
            first.what, got=first.got, expected=first.expected, hint=first.hint, where=first.where, problems=problems
        )


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
