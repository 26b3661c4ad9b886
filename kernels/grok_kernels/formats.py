"""The table of weight formats: which planes a weight consists of, and the shapes and dtypes that they have.

    w[e, n, k] = S · values[e, n, k] − M, in fp32, S and M of output n and of the group that column k belongs to

    format                       S                    M
    fp32, bf16                   1                    0
    int8, fp8_e4m3, int4, int5   scales               0
    int4_zero                    scales               scales · zeros
    int4_min, int5_min           scales               −minima
    int4_k, int5_k               scales · subscales   minima · subminima
    int6_k                       scales · subscales   0

With scales of fp16, S · values is exact in fp32, so that one rounding gives w. GGUF's Q4_0 is int4, Q4_1 int4_min, Q4_K
int4_k and so on; int4_zero is what GPTQ and AWQ store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from .dtypes import DTYPES

Layout = Literal["rows", "panels"]
WIDTH = 64  # outputs of a panel
FP16, FP32 = torch.float16, torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a weight of one format consists of.

    dtype: of the values in rows. planes: its tensors, in their order. bits: of a value in panels; with fewer than 8
    they lie in bit planes as value + zero_point, without a sign. scales: the dtypes that scales and minima may have.
    signed: whether subscales are.
    """

    dtype: torch.dtype
    bits: int
    planes: tuple[str, ...] = ("values",)
    zero_point: int = 0
    scales: tuple[torch.dtype, ...] = (FP32, FP16)
    signed: bool = False

    @property
    def in_bit_planes(self) -> bool:
        """Whether panels hold values in fewer than 8 bits."""
        return self.bits < 8


def _codes(bits: int, *planes: str, zero_point: int = 0, scales: tuple[torch.dtype, ...] = (FP32, FP16)) -> Format:
    return Format(dtype=torch.int8, bits=bits, planes=("values", *planes), zero_point=zero_point, scales=scales)


_TWO_LEVELS = ("scales", "subscales", "minima", "subminima")
FORMATS: dict[str, Format] = {
    "fp32": Format(dtype=DTYPES["fp32"], bits=32),
    "bf16": Format(dtype=DTYPES["bf16"], bits=16),
    "int8": Format(dtype=DTYPES["int8"], bits=8, planes=("values", "scales")),
    "fp8_e4m3": Format(dtype=DTYPES["fp8_e4m3"], bits=8, planes=("values", "scales"), scales=(FP32,)),
    "int4": _codes(4, "scales", zero_point=8),
    "int4_zero": _codes(4, "scales", "zeros"),
    "int4_min": _codes(4, "scales", "minima"),
    "int4_k": _codes(4, *_TWO_LEVELS, scales=(FP16,)),
    "int5": _codes(5, "scales", zero_point=16),
    "int5_min": _codes(5, "scales", "minima"),
    "int5_k": _codes(5, *_TWO_LEVELS, scales=(FP16,)),
    "int6_k": Format(
        dtype=torch.int8, bits=6, planes=("values", "scales", "subscales"), zero_point=32, scales=(FP16,), signed=True
    ),
}
FORMAT_OF = {FORMATS[name].dtype: name for name in DTYPES}  # of values that say it by their dtype
PACKABLE = tuple(name for name, format in FORMATS.items() if format.bits <= 16)  # those that can lie in panels
SUB = ("subscales", "subminima")  # the planes of the second level


@dataclass(frozen=True, slots=True)
class Spec:
    """What the planes of a weight are, beside its shape. groups: of scales along K, and of minima and zeros; subgroups:
    of subscales and subminima. 0 for formats without. scales: the dtype of scales and minima."""

    format: str
    groups: int = 0
    subgroups: int = 0
    scales: torch.dtype = FP32

    def columns(self, k: int) -> int:
        """Columns of the finest group; all of k without groups."""
        return k // (self.subgroups or self.groups or 1)

    def can_pack(self, n: int, k: int) -> bool:
        """Whether matrices (n, k) can lie in panels: n a multiple of 64 and k of 4; in bit planes, k a multiple of 32
        and each group of 16."""
        if self.format not in PACKABLE or n % WIDTH:
            return False
        return k % 4 == 0 if not FORMATS[self.format].in_bit_planes else k % 32 == 0 and self.columns(k) % 16 == 0

    def dtype_of(self, plane: str) -> torch.dtype:
        """In rows."""
        format = FORMATS[self.format]
        if plane == "values":
            return format.dtype
        if plane in ("scales", "minima"):
            return self.scales
        return torch.int8 if format.signed else torch.uint8

    def planes(self, layout: Layout, shape: tuple[int, int, int]) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each plane of a weight (E, N, K), in the format's order."""
        experts, n, _ = shape
        format, found = FORMATS[self.format], {}
        for name in format.planes:
            groups, dtype = self.subgroups if name in SUB else self.groups, self.dtype_of(name)
            size: tuple[int, ...] = (experts, groups, n)
            if name == "values":
                size = values_shape(layout, *shape, self.format)
                dtype = torch.uint8 if layout == "panels" and format.in_bit_planes else dtype
            elif layout == "panels" and format.in_bit_planes:
                size = (experts, n // WIDTH, groups, WIDTH)
            found[name] = size, dtype
        return found

    def nbytes(self, layout: Layout, shape: tuple[int, int, int]) -> int:
        """Of all planes."""
        return sum(prod(size) * dtype.itemsize for size, dtype in self.planes(layout, shape).values())


def values_shape(layout: Layout, experts: int, n: int, k: int, format: str) -> tuple[int, ...]:
    """The shape of the values (experts, n, k) in this layout."""
    if layout == "rows":
        return (experts, n, k)
    if FORMATS[format].in_bit_planes:
        return (experts, n // WIDTH, k // 32, FORMATS[format].bits, WIDTH, 4)
    cell = 4 // FORMATS[format].dtype.itemsize
    return (experts, n // WIDTH, k // cell, 4, 16, cell)
