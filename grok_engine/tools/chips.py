"""GPUs that a plan can name, by their vendors' datasheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PlanWeights = Literal["int8", "fp8", "bf16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One GPU. Rates are dense peaks a second; `fp8` 0 is none; `link` is bytes/s a GPU sends to its neighbours."""

    name: str
    memory: int
    bandwidth: float
    bf16: float
    fp8: float
    int8: float
    link: float

    def peak(self, weights: PlanWeights) -> float:
        """Operations/s of a product with such weights. int8 is made bf16 on the way in (exactly), and so is fp8 where
        the chip has no fp8 arithmetic."""
        return self.fp8 if weights == "fp8" and self.fp8 else self.bf16


def _chip(name: str, mib: int, tb_s: float, bf16: float, fp8: float, int8: float, link_gb_s: float) -> Chip:
    return Chip(
        name=name, memory=mib << 20, bandwidth=tb_s * 1e12, bf16=bf16 * 1e12, fp8=fp8 * 1e12, int8=int8 * 1e12,
        link=link_gb_s * 1e9,
    )  # fmt: skip


# Memory is the total that the driver reports (nvidia-smi, rocm-smi), not the number in the name. Rates are from the
# vendor's datasheet, halved where it quotes sparsity; links are one direction, half of the figure advertised.
CHIPS: dict[str, Chip] = {
    c.name: c
    for c in (
        # NVIDIA A100 datasheet, SXM: NVLink 600 GB/s. No fp8 arithmetic.
        _chip("a100-40gb", 40960, 1.555, 312, 0, 624, 300),
        _chip("a100-80gb", 81920, 2.039, 312, 0, 624, 300),
        # NVIDIA L40S datasheet: PCIe 4.0 x16, no NVLink.
        _chip("l40s-48gb", 46068, 0.864, 362.05, 733, 733, 32),
        # NVIDIA H100 datasheet, SXM: NVLink 900 GB/s.
        _chip("h100-80gb", 81559, 3.35, 989.5, 1979, 1979, 450),
        # NVIDIA H100 NVL datasheet. Its bridge joins only pairs, so the link is PCIe 5.0 x16.
        _chip("h100-94gb", 95330, 3.9, 835.5, 1670.5, 1670.5, 64),
        # NVIDIA H200 datasheet, SXM.
        _chip("h200-141gb", 143771, 4.8, 989.5, 1979, 1979, 450),
        # NVIDIA HGX B200 datasheet: 62 TB/s over eight, NVLink 1.8 TB/s.
        _chip("b200-180gb", 183359, 7.7, 2250, 4500, 4500, 900),
        # AMD Instinct MI300X datasheet: seven Infinity Fabric links of 128 GB/s.
        _chip("mi300x-192gb", 196592, 5.3, 1307.4, 2614.9, 2614.9, 448),
    )
}
