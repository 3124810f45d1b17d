"""Which numbers a model computes with: bf16 where the hardware is fast at it, else fp32; always said, never silent."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from llmkit.errors import ResourceError


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


def slow_precision(precision: str, device: torch.device) -> str | None:
    """What to warn of where a device computes in `precision` without units for it, or None."""
    if precision != "bf16" or _fast_bf16(device) is not None:
        return None
    return f"this {device.type} has no units for bf16, which is emulated: precision: fp32 is many times faster here"


def compute_in(model: torch.nn.Module, precision: str) -> dict[str, torch.Tensor]:
    """Casts a model's fp32 parameters to bf16 where that is the precision; gives the fp32 originals by name.

    Parameters that the family keeps in fp32 (routers, say) stay, and so do buffers (rotary frequencies, say).
    """
    if precision != "bf16":
        return {}
    kept, originals = kept_in_fp32(model), {}
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and name not in kept:
            originals[name] = parameter.data
            parameter.data = parameter.data.to(torch.bfloat16)
    return originals


def kept_in_fp32(model: torch.nn.Module) -> frozenset[str]:
    """The parameters that the family never computes with in fewer bits."""
    parts = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return frozenset(name for name, _ in model.named_parameters() if any(part in name for part in parts))


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context for computing in `precision`: fp16 keeps fp32 weights and sums, and casts for each product.

    bf16 has the range of fp32 and needs none of that: there the weights are cast once, by `compute_in`.
    """
    return torch.autocast(device.type, torch.float16) if precision == "fp16" else nullcontext()


def _fast_bf16(device: torch.device) -> str | None:
    """What makes bf16 fast on a device, or None."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return f"{name} has bf16 units" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return next((f"this CPU has {unit}" for unit in ("amx_bf16", "avx512_bf16") if capabilities.get(unit)), None)
