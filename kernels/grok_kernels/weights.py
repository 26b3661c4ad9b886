"""A quantised or float weight as one object: its format, its layout, and the tensors that hold it.

A new format is an entry of `FORMATS`, which names its planes, and the check of those planes in `Weight.of`. A backend
that does not have it refuses the call by the format's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import layouts, registry
from .checks import FP32, Checker
from .dtypes import DTYPES, dtype_name
from .layouts import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """What a weight of one format consists of."""

    dtype: torch.dtype  # of the values
    # The tensors of a weight, in their order. scales is (E, groups, N) fp32: w[e, n, k] = values[e, n, k] ·
    # scales[e, g, n].
    planes: tuple[str, ...] = ("values",)


FORMATS: dict[str, Format] = {
    "fp32": Format(dtype=DTYPES["fp32"]),
    "bf16": Format(dtype=DTYPES["bf16"]),
    "int8": Format(dtype=DTYPES["int8"], planes=("values", "scales")),
    "fp8_e4m3": Format(dtype=DTYPES["fp8_e4m3"], planes=("values", "scales")),
}
_FORMAT_OF = {format.dtype: name for name, format in FORMATS.items()}


@dataclass(frozen=True, eq=False)
class Weight:
    """E matrices (N, K), whose columns K are contiguous. `Weight.of` builds one and checks; the constructor does not.

    Its planes may be written to, but keep their shapes, types, strides and memory.
    """

    format: str  # a key of FORMATS
    layout: Layout  # of the values
    shape: tuple[int, int, int]  # (E, N, K), whatever the layout
    planes: tuple[Tensor, ...]  # those that the format names, in its order

    @staticmethod
    def of(values: Tensor, scales: Tensor | None = None, layout: Layout = "rows") -> Weight:
        """The weight that these tensors hold; its format is that of the values' dtype.

        values (E, N, K) int8, e4m3, bf16 or fp32, the last dimension contiguous; with layout "panels" as
        `Weight.with_layout` or `pack_into` gave them. scales (E, groups, N) fp32, for int8 and e4m3 only: groups
        divides K. ValueError for what does not fit.
        """
        c = Checker("Weight")
        c.one_of("layout", layout, ("rows", "panels"))
        if layout == "rows":
            c.tensor("values", values, "E N K", tuple(_FORMAT_OF))
            shape = (values.shape[0], values.shape[1], values.shape[2])
        else:
            try:
                shape = layouts.logical_shape(values)
            except ValueError as error:
                raise c.error(str(error)) from None
            c.sizes("values", shape, ["E", "N", "K"])
            c.same_device("values", values)
        name, dtype = _FORMAT_OF[values.dtype], dtype_name(values.dtype)
        if "scales" not in FORMATS[name].planes:
            if scales is not None:
                c.fail(f"scales is given, expected None for values of {dtype}")
            return Weight(name, layout, shape, (values,))
        if scales is None:
            raise c.error(f"scales is None, expected (E, groups, N) for values of {dtype}")
        c.tensor("scales", scales, "E groups N", FP32)
        groups = c.size("groups")
        if groups < 1 or c.size("K") % groups:
            c.fail(f"scales has {groups} groups, expected a divisor of K={c.size('K')}")
        return Weight(name, layout, shape, (values, scales))

    @property
    def values(self) -> Tensor:
        return self.planes[0]

    @property
    def scales(self) -> Tensor | None:
        return self.named_planes().get("scales")

    def named_planes(self) -> dict[str, Tensor]:
        """The planes by the names that the format gives them."""
        return dict(zip(FORMATS[self.format].planes, self.planes, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        return FORMATS[self.format].dtype

    @property
    def nbytes(self) -> int:
        """Of all planes."""
        return sum(plane.nbytes for plane in self.planes)

    def with_layout(self, layout: Layout) -> Weight:
        """The same weight with its values in this layout, a copy; itself where it has it.

        ValueError for one that cannot be packed (`can_pack`).
        """
        if layout == self.layout:
            return self
        change = layouts.pack if layout == "panels" else layouts.unpack
        return Weight(self.format, layout, self.shape, (change(self.values), *self.planes[1:]))

    @property
    def signature(self) -> bytes | None:
        """What checks and selection depend on, for the validated-call cache; None where a plane requires grad, or
        tensors may have tangents (forward-mode differentiation)."""
        if forward_ad._current_level >= 0:
            return None
        for plane in self.planes:  # a loop, since this runs at every call
            if plane.requires_grad:
                return None
        return self._signature

    @cached_property
    def _signature(self) -> bytes | None:
        return registry.signature((self.format, self.layout, *self.shape, *self.planes))


def unsupported(backend: str, args: Iterable[Any], formats: Sequence[str], layouts: Sequence[str]) -> str | None:
    """Why a backend with these formats and layouts cannot take the weights among an op's arguments, if so."""
    for weight in args:
        if isinstance(weight, Weight):
            if weight.format not in formats:
                return f"a weight has format {weight.format}, the {backend} backend takes {', '.join(formats)}"
            if weight.layout not in layouts:
                return f"a weight has layout {weight.layout}, the {backend} backend takes {', '.join(layouts)}"
    return None
