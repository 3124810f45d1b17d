"""What the measurements were taken on, and how fast its matrix products are.

python -m tests.benchmarks.machine

Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.process import lines_of

_PACKAGES = ("llmkit", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers")
_SIZES = (1024, 2048, 4096)
_SECONDS = 1.5  # for each size


def facts() -> dict[str, Any]:
    """Hardware, versions and the commit, with the peaks of `matrix_peak` in FLOP/s."""
    on_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "commit": next(iter(lines_of(["git", "rev-parse", "HEAD"])), None),
        "changed_files": len(lines_of(["git", "status", "--porcelain"])),
        "bf16_peak_flops": matrix_peak(torch.bfloat16),
        "fp32_peak_flops": matrix_peak(torch.float32),
    }


def matrix_peak(dtype: torch.dtype) -> float:
    """The fastest of several products of large square matrices, in FLOP/s: 2 n^3 / seconds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    best = 0.0
    for size in _SIZES if device == "cpu" else (*_SIZES, 8192):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        until = time.perf_counter() + _SECONDS
        while (started := time.perf_counter()) < until:
            torch.matmul(left, right)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(facts()))
