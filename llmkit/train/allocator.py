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
    return _set(mappings=0, trim_threshold=2**31 - 1)


def give_back_freed_memory() -> None:
    """Ends that, and returns to the system what is free now."""
    if _set(mappings=65536, trim_threshold=128 * 1024):
        ctypes.CDLL(None).malloc_trim(0)


def _set(*, mappings: int, trim_threshold: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, mappings) and mallopt(_M_TRIM_THRESHOLD, trim_threshold))
