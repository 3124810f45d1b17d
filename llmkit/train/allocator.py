"""Memory of the C library for training on a CPU: kept between the steps, and in huge pages."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
# Larger blocks come from the system and go back: what is allocated between them would split the heap.
_LARGE = 2**24  # bytes
_MADV_HUGEPAGE = 14  # of Linux's mman.h
_HUGE_PAGE = 2**21


def keep_freed_memory(reserve: int) -> bool:
    """Lets the C library keep freed memory for the tensors of the next step; False where it cannot be told.

    By default glibc returns every large block to the system at once, and each step then waits while the system fills
    the same pages with zeros again. `reserve` bytes of its heap are asked for in pages of 2 MiB, which hold a model's
    weights in few entries of the processor's tables. They are addresses: memory is taken when it is written to.
    PyTorch asks for such pages for larger blocks itself when the environment has THP_MEM_ALLOC_ENABLE=1.
    """
    if not _set(mappings=0, trim_threshold=-1):
        return False
    _ask_for_huge_pages(reserve)
    return _set(mappings=65536, trim_threshold=-1, mapping_threshold=_LARGE)


def give_back_freed_memory() -> None:
    """Ends that, and returns to the system, and to the GPU's other processes, what is free now."""
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
    if _set(mappings=65536, trim_threshold=128 * 1024):
        ctypes.CDLL(None).malloc_trim(0)


def _set(*, mappings: int, trim_threshold: int, mapping_threshold: int = 128 * 1024) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = {_M_MMAP_MAX: mappings, _M_TRIM_THRESHOLD: trim_threshold, _M_MMAP_THRESHOLD: mapping_threshold}
    return mallopt is not None and all(mallopt(*option) for option in options.items())


def _ask_for_huge_pages(size: int) -> None:
    """Grows the heap by so many bytes, untouched, and frees them: what is allocated next comes from there."""
    library = ctypes.CDLL(None)
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = library.malloc(size)
    if block is None:
        return
    start = -(-block // _HUGE_PAGE) * _HUGE_PAGE
    if (length := (block + size - start) // _HUGE_PAGE * _HUGE_PAGE) > 0:
        library.madvise(start, length, _MADV_HUGEPAGE)  # where the system has none, nothing is lost
    library.free(block)
