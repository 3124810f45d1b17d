"""Linear layers whose weights take 4 bits, through bitsandbytes: what stands still below adapters (QLoRA).

NF4 with double quantisation: each 64 numbers share a scale, each 256 scales a scale of their own, 4.13 bits a number in all
(Dettmers et al., 2023: https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from llmkit.errors import RecipeError

_SINCE = (0, 50)  # the first whose kernels for CPUs do all that is needed here
_BLOCK, _BLOCK_OF_SCALES = 64, 256
_MOST_OFF = 0.2  # of the norm; NF4 loses 9 % of normally distributed weights


@dataclass(frozen=True)
class FourBits:
    """What is held in 4 bits: how many layers and numbers, in how many bytes, and how far off (relative, RMS)."""

    layers: int
    numbers: int
    bytes: int
    error: float


def quantize_layers(model: Any, paths: Sequence[str]) -> tuple[str, ...]:
    """Holds the weights of linear layers in 4 bits, in place; gives the paths of those that stay as they are.

    These are layers that the family keeps in fp32, that share their weights with others, or that compute in a way of their
    own. The codes are a function of the weights alone. Works on the meta device. Raises RecipeError without bitsandbytes.
    """
    held = _layer_class(_library())
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    left = []
    for path in paths:
        layer = model.get_submodule(path)
        plain = type(layer) is torch.nn.Linear or type(layer).__name__ == "Conv1D"
        if plain and uses[id(layer.weight)] == 1 and not _stays_in_fp32(model, path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, held(layer).train(layer.training))
        else:
            left.append(path)
    _let_go_of_files(model)
    return tuple(left)


def check_four_bits(device: torch.device) -> None:
    """Raises RecipeError where a device cannot compute with such layers, forward and backward: it is tried."""
    held = _layer_class(_library())
    layer = torch.nn.Linear(_BLOCK, 2, bias=False, device="meta").to_empty(device="cpu")
    wrong = ""
    with torch.enable_grad():
        layer.weight.data = torch.linspace(-1, 1, 2 * _BLOCK).view(2, _BLOCK)
        expected = layer.weight.detach().to(device)
        try:
            x = torch.ones(1, _BLOCK, device=device, requires_grad=True)
            found = held(layer).to(device)(x)
            found.sum().backward()
            assert x.grad is not None, "a product has a gradient"
            for what, one, other in (("product", found, expected.sum(1)), ("gradient", x.grad, expected.sum(0))):
                if not torch.allclose(one.flatten(), other, atol=_MOST_OFF * float(other.norm())):
                    wrong = f"a wrong {what}"
        except (RuntimeError, NotImplementedError, AttributeError, OSError) as error:
            wrong = str(error).partition("\n")[0]
    if wrong:
        raise RecipeError(
            "this device cannot compute with weights of 4 bits",
            got=f"{wrong}, on {device.type}, with bitsandbytes {importlib.metadata.version('bitsandbytes')}",
            hint="use `lora`, or another build of bitsandbytes (`python -m bitsandbytes` looks at this one)",
            where="adapter.name",
        )


def quantized_layers(model: Any) -> dict[str, Any]:
    """The layers that are held in 4 bits, by path."""
    return {path: module for path, module in model.named_modules() if is_quantized(module)}


def is_quantized(module: Any) -> bool:
    """True for a layer that `quantize_layers` has made."""
    return getattr(module, "held_in_four_bits", False) is True


def what_is_quantized(model: Any) -> FourBits:
    """All of a model's layers that are held in 4 bits."""
    layers = list(quantized_layers(model).values())
    lost, whole = (sum(squares) for squares in zip(*(layer.squares for layer in layers), strict=True))
    return FourBits(
        len(layers),
        sum(layer.in_features * layer.out_features for layer in layers),
        sum(t.numel() * t.element_size() for layer in layers for t in (layer.weight, *layer.buffers())),
        math.sqrt(lost / whole) if whole else 0.0,
    )


def numbers_in(module: Any) -> int:
    """The parameters of a model or a part of it, each number of 4 bits counted."""
    packed = sum(
        layer.in_features * layer.out_features - layer.weight.numel()
        for layer in module.modules()
        if is_quantized(layer)
    )
    return packed + sum(p.numel() for p in module.parameters())


def _let_go_of_files(model: Any) -> None:
    """Copies what is not held in 4 bits: a file is mapped into memory as a whole for as long as one tensor of it is used."""
    for module in model.modules():
        for tensor in [*module.parameters(False), *module.buffers(False)] if not is_quantized(module) else ():
            tensor.data = tensor.data.clone()


def _stays_in_fp32(model: Any, path: str) -> bool:
    """True for what a family keeps in fp32 by name: some read that layer's type (T5), others need its precision."""
    lists = (getattr(model, f"_keep_in_fp32_modules{kind}", None) or () for kind in ("", "_strict"))
    names = {name for found in lists if isinstance(found, Collection) for name in found}
    return any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", f"{path}.weight") for name in names)


def _library() -> Any:
    """The package bitsandbytes. Raises RecipeError when it is not installed, or too old."""
    minimum = ".".join(map(str, _SINCE))
    try:
        got = importlib.metadata.version("bitsandbytes")
        if tuple(map(int, re.findall(r"\d+", got)[:2])) >= _SINCE:
            import bitsandbytes

            return bitsandbytes
    except ImportError as error:  # PackageNotFoundError is one
        got = "not installed" if isinstance(error, importlib.metadata.PackageNotFoundError) else str(error)
    raise RecipeError(
        "`qlora` needs the package bitsandbytes",
        got=got,
        expected=f"bitsandbytes {minimum} or newer",
        hint=f"pip install 'bitsandbytes>={minimum}'",
        where="adapter.name",
    )


@cache
def _layer_class(library: Any) -> Any:
    """The class of layers in 4 bits; made when it is needed, since its base may not be installed."""
    functional = library.functional
    with torch.device("cpu"):
        functional.quantize_blockwise(torch.zeros(1))  # it keeps a table on the device that it saw first: not on meta

    class Linear4bit(library.nn.Linear4bit):
        """bitsandbytes' layer, which PEFT knows, but that it computes the same whatever it was asked before.

        Its own forward packs the weights anew when a CPU evaluates, with coarser scales that stay and no gradient, casts
        the bias for good, and remembers the first input's type. And on a CPU 0.50 reads wrong scales where a row is a
        multiple of 16 numbers and not of 64; so weights are kept as rows of 64, which are the same codes and scales.
        """

        held_in_four_bits = True

        def __init__(self, layer: Any) -> None:
            transposed = type(layer).__name__ == "Conv1D"  # (in, out) in place of (out, in)
            weight = layer.weight.detach().t() if transposed else layer.weight.detach()
            super().__init__(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", device="meta")
            self.transposed, self.bias = transposed, layer.bias
            flat = weight.float().flatten()
            rows = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
            codes, state = functional.quantize_4bit(rows, compress_statistics=True, quant_type="nf4")
            packed: Any = torch.nn.Parameter(codes, requires_grad=False)
            packed.compress_statistics, packed.quant_type = True, "nf4"  # what PEFT asks for
            self.weight = packed
            self.register_buffer("scales", state.absmax, persistent=False)  # one a block
            self.register_buffer("scales_offset", state.offset, persistent=False)
            self.register_buffer("scales_scales", state.state2.absmax, persistent=False)
            self.register_buffer("scales_code", state.state2.code, persistent=False)
            self.squares = (0.0, 0.0)  # of what was lost, and of the weights
            if not weight.is_meta:
                lost = self.in_full(torch.float32) - weight
                self.squares = float(lost.square().sum()), float(weight.float().square().sum())

        def in_full(self, dtype: torch.dtype) -> torch.Tensor:
            """The weights that it computes with, (out, in)."""
            scales = functional.QuantState(
                self.scales_scales, code=self.scales_code, blocksize=_BLOCK_OF_SCALES, dtype=torch.float32
            )
            shape = (len(self.scales), _BLOCK)
            state = functional.QuantState(
                *(self.scales, shape, None, _BLOCK, "nf4", dtype), offset=self.scales_offset, state2=scales
            )
            flat = functional.dequantize_4bit(self.weight.data, state).flatten()
            full: torch.Tensor = flat[: self.in_features * self.out_features].view(self.out_features, self.in_features)
            return full

        def original(self) -> torch.Tensor:
            """The same in fp32, in the shape of the layer that it stands for."""
            full = self.in_full(torch.float32)
            return full.t().contiguous() if self.transposed else full

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """(..., in) to (..., out)."""
            if not x.is_meta and torch.is_autocast_enabled(x.device.type):
                x = x.to(torch.get_autocast_dtype(x.device.type))
            product: torch.Tensor = _Product.apply(x, self)
            return product if self.bias is None else product + self.bias.to(x.dtype)

    return Linear4bit


class _Product(torch.autograd.Function):
    """x W^T, with W unpacked anew for the forward and the backward: in between it takes 4 bits a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.in_full(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] @ ctx.layer.in_full(gradients[0].dtype), None
