"""One of the processes that a command starts for a stage: `python -m llmkit.cli.worker PID WORDS`, as `llmkit WORDS` else.

A command that is killed can pass no signal on, and what it leaves behind would train unseen and hold the run. So a worker
looks whether the command, PID, is still there; when it is gone, the worker saves and stops, as after SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from llmkit.cli import app

_LOOK = 0.5  # seconds between looks


def main() -> None:
    """The worker's command line, with the command's process id before all else."""
    threading.Thread(target=_stop_without, args=(int(sys.argv.pop(1)),), name="parent", daemon=True).start()
    app.main()


def _stop_without(command: int) -> None:
    while os.getppid() == command:
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
