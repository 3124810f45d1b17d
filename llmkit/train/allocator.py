"""Memory that is freed and wanted again in the next step should not go back to the system in between."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Lets the C library keep freed memory for the tensors of the next step; False where it cannot be told.

    By default glibc returns every large block to the system at once, and each step then waits while the system fills
    the same pages with zeros again. For training on a CPU; the most memory used at once stays what it is.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
