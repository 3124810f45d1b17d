"""Gradual unfreezing: parts of a model that stand still until a step of their own.

What has thawed is a function of the step alone, so that a training can be resumed anywhere. The optimizer first hears of
a parameter when it thaws, and counts its steps from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmkit.errors import RecipeError
from llmkit.recipe.values import count_of
from llmkit.train.masters import Masters


@dataclass(frozen=True)
class Thaw:
    """The parameters `names` move from the 0-based `step` on."""

    step: int
    what: str
    names: tuple[str, ...]


def thaws_at(planned: Sequence[dict[str, Any]], total_steps: int) -> tuple[Thaw, ...]:
    """A freeze plan's thaws in the order of their steps. Raises RecipeError for one after the last step."""
    thaws = [Thaw(count_of(thaw["at"], total_steps), thaw["what"], tuple(thaw["names"])) for thaw in planned]
    for late in (thaw for thaw in thaws if thaw.step >= total_steps):
        raise RecipeError(
            f"{late.what} would never thaw",
            got=f"at step {late.step} of {total_steps}",
            expected=f"a step before {total_steps}, or a share below 100%",
            where="freeze.unfreeze",
        )
    return tuple(sorted(thaws, key=lambda thaw: thaw.step))


def groups_by_thaw(groups: Sequence[dict[str, Any]], thaws: Sequence[Thaw]) -> list[dict[str, Any]]:
    """Parameter groups of which each begins to move at once: some optimizers want the same history of all in a group."""
    step_of = {name: thaw.step for thaw in thaws for name in thaw.names}
    found = []
    for group in groups:
        steps = [step_of.get(name, 0) for name in group["names"]]
        for step in sorted(set(steps)):
            own = [number for number, at in enumerate(steps) if at == step]
            parts = {key: [group[key][number] for number in own] for key in ("params", "names", "hidden")}
            name = f"{group['group']}, from step {step + 1}" if step else group["group"]
            found.append(group | parts | {"group": name})
    return found


@dataclass
class Thawing:
    """Holds what has not thawed yet; `changed` is called after something has."""

    masters: Masters
    thaws: tuple[Thaw, ...]
    note: Callable[[str], None]
    changed: Callable[[], None] = lambda: None
    _done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        for thaw in self.thaws:
            self.masters.hold(thaw.names)

    def is_due(self, step: int) -> bool:
        """True when something moves from a 0-based step on that did not before."""
        return any(0 < thaw.step <= step for thaw in self.thaws[self._done :])

    def begin(self, step: int) -> None:
        """Lets go of everything that moves in a 0-based step."""
        due = [thaw for thaw in self.thaws[self._done :] if thaw.step <= step]
        for thaw in due:
            self.masters.let_go(thaw.names)
            if thaw.step == step:  # not what had thawed before a training was resumed
                self.note(f"step {step + 1}: {thaw.what} thaws, {len(thaw.names)} tensors")
        self._done += len(due)
        if due:
            self.changed()
