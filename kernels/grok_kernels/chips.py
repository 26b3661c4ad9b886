"""The GPUs that the kernels are tuned for and that plans can name, and which one a tensor is on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Chip:
    """A chip as the kernels see it."""

    name: str
    arch: str  # sm_90, gfx942
    multiprocessors: int
    shared_bytes: int  # the most that one block may have

    @property
    def capability(self) -> int:
        """90 for sm_90; 0 where the chip is not NVIDIA's."""
        return int(self.arch[3:]) if self.arch.startswith("sm_") else 0

    @property
    def has_tma(self) -> bool:
        return self.capability >= 90

    @property
    def has_fp8(self) -> bool:
        """Whether its tensor cores multiply e4m3."""
        return self.capability >= 89


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU that is sold: a chip with its memory. Rates are dense peaks a second; `fp8` 0 is none."""

    name: str
    chip: Chip
    memory: int  # bytes
    bandwidth: float  # bytes/s
    bf16: float
    fp8: float
    int8: float
    link: float  # bytes/s that one GPU sends to its neighbours

    def peak(self, weights: str) -> float:
        """Operations/s of a product with weights "int8", "fp8" or "bf16". int8 becomes bf16 on the way in, exactly, and
        so does fp8 on a chip without fp8 arithmetic."""
        return self.fp8 if weights == "fp8" and self.fp8 else self.bf16


def _gpu(
    chip: Chip, gb: int, mib: int, tb_s: float, bf16: float, fp8: float, int8: float, link_gb_s: float
) -> Gpu:  # fmt: skip
    return Gpu(
        name=f"{chip.name}-{gb}gb", chip=chip, memory=mib << 20, bandwidth=tb_s * 1e12, bf16=bf16 * 1e12,
        fp8=fp8 * 1e12, int8=int8 * 1e12, link=link_gb_s * 1e9,
    )  # fmt: skip


_A100 = Chip("a100", "sm_80", 108, 166912)
_L40S = Chip("l40s", "sm_89", 142, 101376)
_H100 = Chip("h100", "sm_90", 132, 232448)
_H200 = Chip(
    "h200", "sm_90", 132, 232448
)  # an H100 to the compiler, with other memory: what was measured is kept apart
_B200 = Chip("b200", "sm_100", 148, 232448)
_MI300X = Chip("mi300x", "gfx942", 304, 65536)

# Memory is the total that the driver reports (nvidia-smi, rocm-smi), not the number in the name. Rates are from the
# vendor's datasheet, halved where it quotes sparsity; links are one direction, half of the figure advertised.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 datasheet, SXM: NVLink 600 GB/s. No fp8 arithmetic.
        _gpu(_A100, 40, 40960, 1.555, 312, 0, 624, 300),
        _gpu(_A100, 80, 81920, 2.039, 312, 0, 624, 300),
        # NVIDIA L40S datasheet: PCIe 4.0 x16, no NVLink.
        _gpu(_L40S, 48, 46068, 0.864, 362.05, 733, 733, 32),
        # NVIDIA H100 datasheet, SXM: NVLink 900 GB/s.
        _gpu(_H100, 80, 81559, 3.35, 989.5, 1979, 1979, 450),
        # NVIDIA H100 NVL datasheet. Its bridge joins only pairs, so the link is PCIe 5.0 x16.
        _gpu(_H100, 94, 95330, 3.9, 835.5, 1670.5, 1670.5, 64),
        # NVIDIA H200 datasheet, SXM.
        _gpu(_H200, 141, 143771, 4.8, 989.5, 1979, 1979, 450),
        # NVIDIA HGX B200 datasheet: 62 TB/s over eight, NVLink 1.8 TB/s.
        _gpu(_B200, 180, 183359, 7.7, 2250, 4500, 4500, 900),
        # AMD Instinct MI300X datasheet: seven Infinity Fabric links of 128 GB/s.
        _gpu(_MI300X, 192, 196592, 5.3, 1307.4, 2614.9, 2614.9, 448),
    )
}
CHIPS: dict[str, Chip] = {gpu.chip.name: gpu.chip for gpu in GPUS.values()}

_assumed: ContextVar[Chip] = ContextVar("grok_kernels_chip", default=_H100)


@contextmanager
def assume_chip(chip: Chip) -> Iterator[None]:
    """Inside the block, tensors that are on no GPU (under the interpreter, or on `meta`) count as on this chip."""
    token = _assumed.set(chip)
    try:
        yield
    finally:
        _assumed.reset(token)


def chip_name(reported: str) -> str:
    """The name in `CHIPS` of the GPU that reports this name; for a chip not listed there, that name with hyphens.

    Whole words decide, so that what was measured on one chip never serves another: a GH200 is no H200.
    """
    words = re.findall("[a-z0-9]+", reported.lower())
    return next((name for name in CHIPS if name in words), "-".join(words))


def chip_of(device: torch.device) -> Chip:
    """The chip that this device is; for a device that is no GPU, the assumed one."""
    return _read(device.index or 0) if device.type == "cuda" else _assumed.get()


def multiplies_fp8(device: torch.device) -> bool:
    """Whether this device is a GPU whose tensor cores multiply e4m3."""
    return device.type == "cuda" and chip_of(device).has_fp8


@lru_cache
def _read(index: int) -> Chip:
    p: Any = torch.cuda.get_device_properties(index)
    arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    return Chip(chip_name(p.name), arch, p.multi_processor_count, p.shared_memory_per_block_optin)
