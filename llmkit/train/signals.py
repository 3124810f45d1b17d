"""Being asked to stop: SIGTERM, SIGUSR1 and Ctrl-C end a training after the step in hand and a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from llmkit.errors import InterruptedByUserError, LlmkitError, StoppedError

_WATCHED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """While entered, remembers the first signal; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
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
        self.received = self.received or signal.Signals(number)

    def error(self, step: int) -> LlmkitError:
        """What to raise once the checkpoint of `step` stands."""
        interrupted = self.received == signal.SIGINT
        kind = InterruptedByUserError if interrupted else StoppedError
        name = "Ctrl-C" if interrupted else self.received.name if self.received else "another process's signal"
        return kind(
            f"stopped by {name} after step {step}, which is saved",
            hint="run the same command again to go on from there",
        )
