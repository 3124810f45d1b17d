"""Parts of a model, named by its anatomy or by patterns over parameter names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from llmkit.errors import Problem, RecipeError, did_you_mean
from llmkit.model.anatomy import Anatomy

REGEX_PREFIX = "re:"
GRAMMAR = '"0-19", "0-3,8,10-11", "all", "all but the last 4" or "none"'


@dataclass(frozen=True)
class Parts:
    """What a recipe names. `patterns` are globs over parameter names, or `re:` and a regex."""

    blocks: str | None = None
    embeddings: bool = False
    head: bool = False
    norms: bool = False
    patterns: tuple[str, ...] = ()


def resolve_parts(
    parts: Parts, anatomy: Anatomy, names: list[str], where: str
) -> tuple[dict[str, tuple[str, list[str]]], list[Problem]]:
    """Each rule -> what it covers, in words, and the parameters it names; and every mistake, below the key `where`."""
    matches: dict[str, tuple[str, list[str]]] = {}
    problems: list[Problem] = []
    if parts.blocks is not None:
        try:
            numbers = blocks_named(parts.blocks, anatomy, where)
        except RecipeError as error:
            problems.extend(error.problems)
        else:
            covered = [name for number in numbers for name in anatomy.blocks[number]]
            matches[f"blocks {parts.blocks.strip()}"] = (counted(len(numbers), "block"), covered)
    aliases = [alias for others in anatomy.tied.values() for alias in others]
    named: dict[str, tuple[bool, Iterable[str]]] = {
        "embeddings": (parts.embeddings, anatomy.embeddings),
        "head": (parts.head, (*anatomy.head, *anatomy.tied_head)),
        "norms": (parts.norms, anatomy.norms),
    }
    for part, (wanted, covers) in named.items():
        covered = list(covers)
        if wanted and not covered:
            problems.append(Problem(f"this model has no {part}", hint=f"leave out `{part}`", where=f"{where}.{part}"))
        elif wanted:
            matches[part] = (counted(len(covered), "tensor"), covered)
    for pattern in parts.patterns:
        try:
            matching = _matcher(pattern)
        except re.error as error:
            problems.append(
                Problem("a pattern is not a regular expression", pattern, hint=str(error), where=f"{where}.patterns")
            )
            continue
        covered = [name for name in (*names, *aliases) if matching(name)]
        if covered:
            matches[f"pattern {pattern}"] = (counted(len(covered), "tensor"), covered)
        else:
            problems.append(_nothing_matches(pattern, [*names, *aliases], where))
    return matches, problems


def _matcher(pattern: str) -> Callable[[str], bool]:
    if pattern.startswith(REGEX_PREFIX):
        expression = re.compile(pattern.removeprefix(REGEX_PREFIX))
        return lambda name: expression.fullmatch(name) is not None
    return lambda name: fnmatchcase(name, pattern)


def _nothing_matches(pattern: str, names: list[str], where: str) -> Problem:
    close = difflib.get_close_matches(pattern.removeprefix(REGEX_PREFIX), names, n=3, cutoff=0.3)
    return Problem(
        "a pattern matches no parameter",
        got=pattern,
        expected="a glob over parameter names, or `re:` and a regular expression for whole names",
        hint="the closest names are " + ", ".join(close) if close else "the first names are " + some_of(names),
        where=f"{where}.patterns",
    )


def blocks_named(text: str, anatomy: Anatomy, where: str) -> list[int]:
    """The block numbers that `text` names, in order."""
    count = len(anatomy.blocks)
    words = " ".join(text.lower().split())
    if words == "none":
        return []
    if count == 0:
        raise _blocks_error("this model has no blocks", text, anatomy, where)
    if words == "all":
        return list(range(count))
    if last := re.fullmatch(r"all but the last(?: (\d+))?", words):
        kept = int(last[1] or 1)
        if not 0 < kept < count:
            raise _blocks_error(
                "there are not so many blocks" if kept else "`last 0` leaves nothing out",
                *(text, anatomy, where),
            )
        return list(range(count - kept))
    numbers: list[int] = []
    for part in words.split(","):
        span = re.fullmatch(r"(\d+)(?: ?- ?(\d+))?", part.strip())
        if span is None:
            raise _blocks_error("blocks cannot be read", text, anatomy, where)
        first, end = int(span[1]), int(span[2] or span[1])
        if first > end:
            raise _blocks_error(f"the range `{part.strip()}` runs backwards", text, anatomy, where)
        if end >= count:
            raise _blocks_error(f"there is no block {end}", text, anatomy, where)
        if set(numbers) & set(range(first, end + 1)):
            raise _blocks_error(f"`{part.strip()}` overlaps a range before it", text, anatomy, where)
        numbers.extend(range(first, end + 1))
    return sorted(numbers)


def _blocks_error(what: str, text: str, anatomy: Anatomy, where: str) -> RecipeError:
    count = len(anatomy.blocks)
    stacks = " and ".join(f"{number} in {name}" for name, number in anatomy.stacks)
    has = f"the model has {counted(count, 'block')}" + (f", 0 to {count - 1} ({stacks})" if count else "")
    hint = did_you_mean(text, ["all", "none", "all but the last"])
    return RecipeError(what, got=text, expected=f"{GRAMMAR}; {has}", hint=hint, where=f"{where}.blocks")


def counted(count: int, noun: str) -> str:
    """`1 block`, `2 blocks`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def some_of(names: list[str]) -> str:
    """The first three, and how many there are beside."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
