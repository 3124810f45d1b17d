"""When a training saves, and when it has to stop so that it is done in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from llmkit.recipe.training import Training
from llmkit.recipe.values import seconds_of

_RETRY_SECONDS = 60.0
ASSUMED_SPEED = 250e6  # bytes a second that a disk takes, until a checkpoint has been written


@dataclass
class Times:
    """Of one process: how long things take, and what is due. `deadline` is a time of `time.monotonic`, None for none."""

    training: Training
    step: int  # that is saved
    deadline: float | None = None
    slowest_step: float = 0.0  # seconds, held-out evaluation included
    slowest_save: float = 0.0
    steps_to_a_stop: int = 1  # at most, until there is something to save
    _saved_at: float = field(default_factory=time.monotonic)
    _retry_at: float | None = None

    def saved(self, step: int) -> None:
        """A checkpoint of this step has been begun."""
        self.step, self._saved_at, self._retry_at = step, time.monotonic(), None

    def failed(self) -> None:
        """One could not be written."""
        self._retry_at = time.monotonic() + _RETRY_SECONDS

    def due_by_steps(self, step: int) -> bool:
        """True after a step after which to save; every process says the same."""
        every = self.training.save_every
        return self.training.lose_at_most is None and isinstance(every, int) and step != self.step and step % every == 0

    def due_by_time(self) -> bool:
        """True when a checkpoint has to be begun after the step that comes. Clocks differ: the first process decides."""
        now, every = time.monotonic(), self.training.save_every
        if self._retry_at is not None:
            return now >= self._retry_at
        if self.training.lose_at_most is not None:
            # What is lost is most just before a checkpoint stands: all since the one before it was begun.
            ends = now + 2 * self.slowest_step + self.slowest_save
            return ends - self._saved_at >= seconds_of(self.training.lose_at_most)
        return isinstance(every, str) and now - self._saved_at >= seconds_of(every)

    @property
    def bound(self) -> float:
        """Seconds within which a training that is asked to stop has saved and ended: a step at hand, and a checkpoint."""
        return self.steps_to_a_stop * self.slowest_step + self.slowest_save

    def must_stop(self) -> bool:
        """True when, after the step that comes, there would be no time for another one and a checkpoint."""
        return self.deadline is not None and time.monotonic() + self.slowest_step + self.bound >= self.deadline


def logged_steps(every: int, last: int) -> Callable[[int], bool]:
    """Whether a step is logged: the first one, each that `every` divides, and the last one."""
    return lambda step: step in (1, last) or step % every == 0
