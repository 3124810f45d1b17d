"""Which numbers a model computes with: bf16 where the hardware is fast at it, else fp32; always said, never silent."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from llmkit.errors import ResourceError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> torch.device:
    """The first GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str | None]:
    """bf16, fp16 or fp32, and why it was chosen (None when the recipe names it).

    Raises ResourceError when the device cannot compute in what the recipe names.
    """
    if wanted == "auto":
        fast = _fast_bf16(device)
        return ("bf16", fast) if fast else ("fp32", f"no fast bf16 on this {device.type}")
    if wanted == "fp16" and device.type == "cpu":
        raise ResourceError(
            "fp16 training needs a GPU", got="a CPU", expected="precision: auto, bf16 or fp32", where="precision"
        )
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ResourceError(
            "this GPU cannot compute in bf16", got=torch.cuda.get_device_name(device), expected="fp16 or fp32"
        )
    return wanted, None


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which products run in `precision`; weights stay as they are."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


def _fast_bf16(device: torch.device) -> str | None:
    """What makes bf16 fast on a device, or None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name} has bf16 units" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return next((f"this CPU has {unit}" for unit in ("amx_bf16", "avx512_bf16") if capabilities.get(unit)), None)
