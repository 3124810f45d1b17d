"""Being asked to stop: SIGTERM, SIGUSR1 and Ctrl-C end a training after the step in hand and a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from llmkit.errors import InterruptedByUserError, LlmkitError, StoppedError

_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)  # the last one: time is up


class StopRequest:
    """While entered, remembers the first signal and says what comes; a second Ctrl-C interrupts at once."""

    def __init__(self, tell: Callable[[str], None] = lambda name: None) -> None:
        self.received: signal.Signals | None = None
        self._tell = tell
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _WATCHED}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            self._tell(self.name)

    @property
    def name(self) -> str:
        """What the signal is called."""
        known = {None: "no signal", signal.SIGINT: "Ctrl-C", signal.SIGALRM: "the time limit"}
        return known.get(self.received) or self.received.name  # type: ignore[union-attr]

    def error(self, step: int, *, in_time: bool = False) -> LlmkitError:
        """What to raise once the checkpoint of `step` stands; `in_time` when it is because time is up."""
        interrupted = self.received == signal.SIGINT
        kind = InterruptedByUserError if interrupted else StoppedError
        name = self.name if self.received else "the time limit" if in_time else "another process's signal"
        return kind(
            f"stopped by {name} after step {step}, which is saved",
            hint="run the same command again to go on from there",
        )
