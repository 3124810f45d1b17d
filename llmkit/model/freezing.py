"""Freezing as data: rules are resolved against a model's anatomy into a plan, and the plan is applied later.

Planning needs names and shapes only, so a model on the meta device will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from llmkit.errors import ArtifactError, Problem, RecipeError, raise_all
from llmkit.model.anatomy import Anatomy, read_anatomy
from llmkit.model.parts import Parts, counted, resolve_parts, some_of
from llmkit.recipe.values import is_share

_HEAD_ALONE = 20  # percent of the steps of `head-first`
_ALL_THAWED = 50  # percent of the steps after which `ulmfit` trains everything


@dataclass(frozen=True)
class ThawRule:
    """What a recipe says shall begin to move: `at` a share of the steps (`30%`) or after a number of them."""

    at: str | int
    parts: Parts


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
    thaws: tuple[dict[str, Any], ...] = ()  # what of `frozen` begins to move: `names`, `what` in words, and `at`

    @property
    def frozen_for_good(self) -> frozenset[str]:
        """What never moves."""
        return frozenset(self.frozen).difference(*(thaw["names"] for thaw in self.thaws))

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
        wrong = [thaw for thaw in given.get("thaws", []) if not _is_thaw(thaw)]
        if wrong:
            raise ArtifactError("a freeze plan is damaged", got=wrong[0], hint="run `llmkit freeze` again")
        plan: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in given.items()}
        return FreezePlan(**plan)


def plan_freeze(model: nn.Module, parts: Parts, unfreeze: str | Sequence[ThawRule] = ()) -> FreezePlan:
    """Which parameters stand still, and what of them begins to move when; tied weights are one tensor and go together.

    `unfreeze` is a list of what thaws, or the name of a schedule that begins with the head alone and ends with all but
    `parts`: `head-first` thaws everything at 20 % of the steps; `ulmfit` thaws one block after the other, the last one
    first, until half of the steps are done (Howard and Ruder, 2018: https://arxiv.org/abs/1801.06146). Raises
    RecipeError, with every mistake at once, for a block that does not exist, a rule or pattern that matches nothing,
    rules that leave nothing to train, and for thawing what does not stand still.
    """
    anatomy = read_anatomy(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    matches, problems = resolve_parts(parts, anatomy, list(sizes), "freeze")
    named = {name for matched in matches.values() for name in matched[1]}
    stands_still = anatomy.tensors(named)
    if isinstance(unfreeze, str):
        raise_all(problems)
        thaws = _preset(unfreeze, anatomy, list(sizes), stands_still)
        stands_still = stands_still.union(*(thaw["names"] for thaw in thaws))
        named |= stands_still
        matches |= {f"{thaw['what']}, until {thaw['at']}": (unfreeze, thaw["names"]) for thaw in thaws}
    else:
        resolved = all(problem.where != "freeze.blocks" for problem in problems)
        thaws, more = _thaws(unfreeze, anatomy, list(sizes), stands_still, resolved=resolved)
        raise_all([*problems, *more])
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
        scalars = sum(sizes[name] for name in anatomy.tensors(matched))
        reasons[rule] = f"{what}, {counted(scalars, 'parameter')}"
    return FreezePlan(
        frozen=frozen,
        trainable=trainable,
        reasons=reasons,
        notes=_tied_notes(anatomy, named, stands_still),
        frozen_count=sum(sizes[name] for name in frozen),
        trainable_count=sum(sizes[name] for name in trainable),
        frozen_prefix_blocks=anatomy.frozen_prefix(stands_still),
        thaws=tuple(thaws),
    )


def apply_freeze(model: nn.Module, plan: FreezePlan) -> None:
    """Sets `requires_grad` of all that ever moves. Raises ArtifactError, changing nothing, when the plan is another model's."""
    names = {name for name, _ in model.named_parameters()}
    planned = {*plan.frozen, *plan.trainable}
    for what, odd in (("the model has no", planned - names), ("the plan says nothing of", names - planned)):
        if odd:
            raise ArtifactError(
                "the freeze plan belongs to another model",
                got=f"{what} {some_of(sorted(odd))}",
                hint="run `llmkit freeze` again for this model",
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in plan.frozen_for_good)


def _is_thaw(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"at", "what", "names"}:
        return False
    names = value["names"]
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    at = is_share(value["at"]) or (isinstance(value["at"], int) and value["at"] >= 0)
    return named and at and isinstance(value["what"], str)


def _thaws(
    rules: Sequence[ThawRule], anatomy: Anatomy, names: list[str], stands_still: set[str], *, resolved: bool
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """What thaws by the recipe's own list, and the mistakes in it; `resolved` says that the frozen blocks are known."""
    thaws: list[dict[str, Any]] = []
    problems: list[Problem] = []
    for number, rule in enumerate(rules):
        where = f"freeze.unfreeze.{number}"
        matches, more = resolve_parts(rule.parts, anatomy, names, where)
        problems += more
        given = anatomy.tensors(name for _, matched in matches.values() for name in matched)
        before = {name for thaw in thaws for name in thaw["names"]}
        for what, odd in (
            ("does not stand still", given - stands_still if resolved else set()),
            ("thaws twice", given & before),
        ):
            if odd:
                problems.append(
                    Problem(
                        f"`{', '.join(matches)}` {what}",
                        got=some_of(sorted(odd)),
                        expected="parts that `freeze` names, each once",
                        where=where,
                    )
                )
        if not given and not more:
            problems.append(Problem("this thaws nothing", got=f"blocks: {rule.parts.blocks}", where=where))
        if given:
            thaws.append({"at": rule.at, "what": ", ".join(matches), "names": [n for n in names if n in given]})
    return thaws, problems


def _preset(preset: str, anatomy: Anatomy, names: list[str], stands_still: set[str]) -> list[dict[str, Any]]:
    """What thaws by a schedule that has a name; never what the recipe freezes for good."""
    head = {*anatomy.head, *anatomy.final}
    waves = [("all but the head", [name for name in names if name not in head])]
    shares = [float(_HEAD_ALONE)]
    if preset == "ulmfit" and anatomy.blocks:
        inside = {name for block in anatomy.blocks for name in block}
        rest = [name for name in names if name not in head | inside]
        last = len(anatomy.blocks) - 1
        waves = [(f"block {last - number}", list(block)) for number, block in enumerate(reversed(anatomy.blocks))]
        waves[-1] = ("block 0 and the embeddings", [*waves[-1][1], *rest])
        shares = [_ALL_THAWED * (number + 1) / len(waves) for number in range(len(waves))]
    moving = [
        {"at": f"{share:g}%", "what": what, "names": [name for name in covered if name not in stands_still]}
        for (what, covered), share in zip(waves, shares, strict=True)
    ]
    thaws = [thaw for thaw in moving if thaw["names"]]
    if not thaws:
        raise RecipeError("there is nothing to thaw", got=preset, hint="leave `unfreeze` out", where="freeze.unfreeze")
    return thaws


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
