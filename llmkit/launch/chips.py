"""What GPUs can do, from their makers' data sheets, and what their matrix products were measured to reach.

Peaks are dense: data sheets of NVIDIA since Ampere print twice as much, "with sparsity". Rates between GPUs are in one
direction: data sheets add both. `matmul` is the largest rate of bf16 products that others measured, at the best shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmkit.errors import UsageError, did_you_mean

_T, _G = 1e12, 1e9
_SHEET = "https://www.nvidia.com/en-us/data-center/"
_BOOK = "https://github.com/stas00/ml-engineering/tree/master/compute/accelerator"  # its table of achievable products
_TABLE = "https://github.com/mag-/gpu_benchmark"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"


@dataclass(frozen=True)
class Chip:
    """One GPU. `peak` is FLOP/s by precision, rates are bytes a second, `sources` name where the figures stand."""

    name: str
    title: str
    memory_bytes: int
    peak: dict[str, float]
    matmul: float
    memory_rate: float
    link_rate: float  # to the other GPUs of its machine, one direction
    network_rate: float  # to other machines, one direction, a GPU's share
    network_from: str
    sources: tuple[str, ...]
    others: tuple[str, ...] = ()  # names that also mean it
    mesh: int = 0  # GPUs that are linked in pairs, and not through a switch

    @property
    def peer_rate(self) -> float:
        """Bytes a second to one other GPU of its machine."""
        return self.link_rate / (self.mesh - 1) if self.mesh else self.link_rate

    def product_rate(self, precision: str) -> float:
        """What the best matrix products reach, FLOP/s: the measured share of the peak holds for other precisions too."""
        return self.peak[precision] * min(1.0, self.matmul / self.peak["bf16"])


def _chip(
    name: str,
    title: str,
    memory: int,  # GiB: what is sold as GB has that many
    peak: tuple[float, float, float],  # TFLOP/s in bf16, fp8 (0: has none) and fp32
    matmul: float,  # TFLOP/s
    rates: tuple[float, float, float],  # GB/s: memory, link, network
    network_from: str,
    *sources: str,
    others: tuple[str, ...] = (),
    mesh: int = 0,
) -> Chip:
    bf16, fp8, fp32 = (value * _T for value in peak)
    peaks = {"bf16": bf16, "fp16": bf16, "fp32": fp32} | ({"fp8": fp8} if fp8 else {})
    memory_rate, link, network = (rate * _G for rate in rates)
    return Chip(
        name, title, memory * 2**30, peaks, matmul * _T, memory_rate, link, network, network_from, sources, others, mesh
    )


_DGX_H100 = "400 Gbit/s a GPU, as in a DGX H100"
_DGX_A100 = "200 Gbit/s a GPU, as in a DGX A100"
_SHARED = "100 Gbit/s for 8 GPUs: a guess, these are sold without a network"
_PCIE4, _PCIE5, _SHARED_RATE = 32, 64, 12.5 / 8

# fmt: off
CHIPS: tuple[Chip, ...] = (
    _chip(
        "b200", "NVIDIA B200 (SXM)", 180, (2250, 4500, 75), 1745, (8000, 900, 50), "400 Gbit/s a GPU, as in a DGX B200",
        "https://www.nvidia.com/en-us/data-center/dgx-b200/", _SHEET + "hgx/", _BOOK,
    ),
    _chip(
        "h200", "NVIDIA H200 (SXM)", 141, (989, 1979, 67), 794.5, (4800, 450, 50), _DGX_H100,
        _SHEET + "h200/", _BOOK, others=("h200-sxm", "h200-141gb"),
    ),
    _chip(
        "h100", "NVIDIA H100 SXM", 80, (989, 1979, 67), 794.5, (3350, 450, 50), _DGX_H100,
        _SHEET + "h100/", _BOOK, others=("h100-sxm", "h100-sxm5", "h100-80gb", "h100-sxm5-80gb"),
    ),
    _chip(
        "h100-nvl", "NVIDIA H100 NVL", 94, (835, 1671, 60), 488.5, (3900, _PCIE5, _SHARED_RATE), _SHARED,
        _SHEET + "h100/", _TABLE,
    ),
    _chip(
        "h100-pcie", "NVIDIA H100 PCIe", 80, (756, 1513, 51), 499.5, (2000, _PCIE5, _SHARED_RATE), _SHARED,
        "https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper", _TABLE,
    ),
    _chip(
        "a100", "NVIDIA A100 SXM 80GB", 80, (312, 0, 19.5), 271.2, (2039, 300, 25), _DGX_A100,
        _SHEET + "a100/", _BOOK, others=("a100-sxm", "a100-80gb", "a100-sxm4-80gb", "a100-sxm-80gb"),
    ),
    _chip(
        "a100-40gb", "NVIDIA A100 SXM 40GB", 40, (312, 0, 19.5), 271.2, (1555, 300, 25), _DGX_A100,
        "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/nvidia-ampere-architecture-whitepaper.pdf",
        _BOOK, others=("a100-sxm4-40gb", "a100-sxm-40gb"),
    ),
    _chip(
        "a100-pcie", "NVIDIA A100 PCIe 80GB", 80, (312, 0, 19.5), 252.9, (1935, _PCIE4, _SHARED_RATE), _SHARED,
        _SHEET + "a100/", _BOOK, others=("a100-80gb-pcie", "a100-pcie-80gb"),
    ),
    _chip(
        "mi300x", "AMD Instinct MI300X", 192, (1307.4, 2614.9, 163.4), 758.3, (5300, 448, 50),
        "400 Gbit/s a GPU, as in most of its clusters",
        "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html", _TABLE, others=("mi300x-oam",), mesh=8,
    ),
    _chip(
        "l40s", "NVIDIA L40S", 48, (362.05, 733, 91.6), 252, (864, _PCIE4, _SHARED_RATE), _SHARED,
        _SHEET + "l40s/", _TABLE,
    ),
    _chip(
        "l4", "NVIDIA L4", 24, (121, 242, 30.3), 91.4, (300, _PCIE4, _SHARED_RATE), _SHARED, _SHEET + "l4/", _TABLE
    ),
    _chip(
        "rtx-4090", "NVIDIA GeForce RTX 4090", 24, (165.2, 330.3, 82.6), 178.5, (1008, _PCIE4, _SHARED_RATE), _SHARED,
        _ADA, _TABLE, others=("4090",),
    ),
)
# fmt: on

_MAKERS = {"nvidia", "amd", "geforce", "instinct", "tesla", "gpu", "hbm2e", "hbm3", "hbm3e"}


def find_chip(text: str, where: str = "--gpu") -> Chip:
    """The GPU of a name as people or drivers write it: `h100`, `H100-SXM`, `NVIDIA A100-SXM4-80GB`.

    Raises UsageError, with the nearest name, when there is none.
    """
    words = [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word and word not in _MAKERS]
    wanted = "-".join(words)
    for chip in CHIPS:
        if wanted.replace("-", "") in {name.replace("-", "") for name in (chip.name, *chip.others)}:
            return chip
    names = [chip.name for chip in CHIPS]
    spellings = {name: chip.name for chip in CHIPS for name in (chip.name, *chip.others)}
    raise UsageError(
        "no figures are known of this GPU",
        got=text,
        expected="one of " + ", ".join(names),
        hint=did_you_mean(wanted, spellings),
        where=where,
    )
