"""Whether an llmkit has a run open, found out without a file being made, written or locked for any time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmkit.run.newest import whole


def is_held(path: Path, process: Mapping[str, Any] | None = None) -> bool:
    """True while an llmkit has the run open.

    The lock is only asked for, shared and for no time, and no file is made. Where it cannot be asked for, `process`, of
    run.json, tells when it is one of this machine's.
    """
    try:
        descriptor = os.open(path / ".lock", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        return error.errno == errno.EACCES and _lives(process or {})
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES) or _lives(process or {})
    finally:
        os.close(descriptor)
    return False


def _lives(process: Mapping[str, Any]) -> bool:
    """True when a process of this machine is there."""
    pid = whole(process.get("pid"))
    if pid is None or pid <= 0 or process.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True
