"""A quantised or float weight as one object: its format, its layout, and the tensors that hold it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import layouts, registry
from .bit_planes import pack_codes, unpack_codes
from .checks import Checker
from .dtypes import dtype_name
from .formats import FORMAT_OF, FORMATS, FP16, SUB, WIDTH, Layout, Spec
from .memory import weight_memory


@dataclass(frozen=True, eq=False)
class Weight:
    """E matrices (N, K), whose columns K are contiguous. `Weight.of` builds one and checks; the constructor does not.

    Its planes may be written to, but keep their shapes, types, strides and memory.
    """

    format: str  # a key of FORMATS
    layout: Layout
    shape: tuple[int, int, int]  # (E, N, K), whatever the layout
    planes: tuple[Tensor, ...]  # those that the format names, in its order

    @staticmethod
    def of(
        values: Tensor,
        scales: Tensor | None = None,
        layout: Layout = "rows",
        *,
        format: str | None = None,
        **others: Tensor,
    ) -> Weight:
        """The weight that these tensors hold. format: a key of FORMATS; by default that of the values' dtype.

        values (E, N, K) int8, e4m3, bf16 or fp32, the last dimension contiguous; with layout "panels" as
        `Weight.with_layout` or `write` gave them. Of formats with fewer than 8 bits they are int8 in rows, within
        −zero_point..2^bits − 1 − zero_point, or the products are undefined.

        scales, and others, the planes that the format has beside them: (E, groups, N), groups a divisor of K, and of
        subscales and subminima a multiple of the groups of scales. scales and minima are fp32 or fp16, of formats _k
        fp16, of e4m3 fp32; zeros, subscales and subminima uint8, subscales of int6_k int8. In panels with fewer than 8
        bits all of these are contiguous (E, N/64, groups, 64), with groups of a multiple of 16 columns.

        ValueError for what does not fit.
        """
        c = Checker("Weight")
        c.one_of("layout", layout, ("rows", "panels"))
        if format is None:
            if layout == "rows" or not isinstance(values, Tensor):
                c.tensor("values", values, "E N K", tuple(FORMAT_OF))
            format = FORMAT_OF.get(values.dtype, "int8")  # panels of other dtypes are refused below, by their shape
        c.one_of("format", format, tuple(FORMATS))
        expected, shape = FORMATS[format], _logical_shape(c, format, layout, values)
        planes = {"values": values, "scales": scales, **others}
        for name, plane in planes.items():
            if plane is not None and name not in expected.planes:
                c.fail(f"{name} is given, expected None for format {format}")
        for name in expected.planes[1:]:
            _check_plane(c, format, layout, name, planes.get(name))
        if scales is not None and (minima := planes.get("minima")) is not None:
            c.same_dtype("minima", minima, "scales", scales)
        _check_groups(c, format, layout)
        return Weight(format, layout, shape, tuple(planes[name] for name in expected.planes))  # type: ignore[misc]

    @staticmethod
    def empty(spec: Spec, layout: Layout, shape: tuple[int, int, int], device: torch.device | str) -> Weight:
        """Room for a weight, uninitialised; on a CPU in huge pages, where the system has them (`weight_memory`)."""
        planes = (weight_memory(size, dtype, device) for size, dtype in spec.planes(layout, shape).values())
        return Weight(spec.format, layout, shape, tuple(planes))

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
        """Of the values in rows."""
        return FORMATS[self.format].dtype

    @property
    def nbytes(self) -> int:
        """Of all planes."""
        return sum(plane.nbytes for plane in self.planes)

    @property
    def spec(self) -> Spec:
        """What the planes are, beside the shape."""
        if len(self.planes) == 1:
            return Spec(self.format)
        planes = self.named_planes()
        axis = 2 if self._panel_major else 1
        sub = planes.get("subscales")
        return Spec(
            self.format, planes["scales"].shape[axis], 0 if sub is None else sub.shape[axis], planes["scales"].dtype
        )

    @property
    def _panel_major(self) -> bool:
        """Whether the planes beside the values are (E, N/64, groups, 64)."""
        return self.layout == "panels" and FORMATS[self.format].in_bit_planes

    def with_layout(self, layout: Layout) -> Weight:
        """The same weight in this layout, a copy; itself where it has it.

        ValueError for one that cannot be packed (`Spec.can_pack`).
        """
        if layout == self.layout:
            return self
        format = FORMATS[self.format]
        if not format.in_bit_planes:
            change = layouts.pack if layout == "panels" else layouts.unpack
            return Weight(self.format, layout, self.shape, (change(self.values), *self.planes[1:]))
        if layout == "rows":
            scales = (plane.transpose(1, 2).flatten(2) for plane in self.planes[1:])
            values = unpack_codes(self.values, format.zero_point)
            return Weight(self.format, layout, self.shape, (values, *(plane.contiguous() for plane in scales)))
        spec, (experts, n, k) = self.spec, self.shape
        if not spec.can_pack(n, k):
            raise ValueError(
                f"with_layout: weight of format {self.format} has shape {self.shape} and groups of {spec.columns(k)} "
                f"columns, expected N a multiple of {WIDTH}, K of 32 and groups of 16"
            )
        packed = Weight.empty(spec, layout, self.shape, self.values.device)
        for e in range(experts):
            packed.write(e, 0, {name: plane[e] for name, plane in self.named_planes().items()})
        return packed

    def write(self, expert: int, row: int, planes: Mapping[str, Tensor]) -> None:
        """Write planes of rows row..row+n−1 of one expert: values (n, K), and the others (groups, n), as in rows.

        In panels, row and n are multiples of 64. Planes that are not named stay as they are.
        """
        for name, plane in planes.items():
            room = self.named_planes()[name]
            n = plane.shape[0 if name == "values" else 1]
            if self.layout == "panels" and (row % WIDTH or n % WIDTH):
                raise ValueError(f"write: rows {row}..{row + n}, expected multiples of {WIDTH} in panels")
            if name == "values":
                self._write_values(room[expert : expert + 1], row, plane)
            elif self._panel_major:
                part = room[expert, row // WIDTH : (row + n) // WIDTH]
                part.copy_(plane.unflatten(1, (-1, WIDTH)).transpose(0, 1))
            else:
                room[expert, :, row : row + n].copy_(plane)

    def _write_values(self, room: Tensor, row: int, values_NK: Tensor) -> None:
        format = FORMATS[self.format]
        if self.layout == "rows":
            room[0, row : row + len(values_NK)].copy_(values_NK)
        elif format.in_bit_planes:
            native = layouts.native if room.device.type == values_NK.device.type == "cpu" else None
            pack = native.pack_codes if native is not None else pack_codes
            pack(values_NK[None], room, row, format.zero_point)
        else:
            layouts.pack_into(values_NK[None].to(room.dtype), room, row)

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
        return registry.key((self.format, self.layout, *self.shape, *self.planes))


def _logical_shape(c: Checker, format: str, layout: Layout, values: Tensor) -> tuple[int, int, int]:
    """(E, N, K), bound in `c`."""
    if layout == "rows":
        c.tensor("values", values, "E N K", (FORMATS[format].dtype,))
        return (values.shape[0], values.shape[1], values.shape[2])
    try:
        shape = layouts.logical_shape(values)
    except ValueError as error:
        raise c.error(str(error)) from None
    (expected, dtype) = Spec(format).planes("panels", shape)["values"]
    if tuple(values.shape) != expected or values.dtype != dtype:
        c.fail(
            f"values have shape {tuple(values.shape)} and dtype {dtype_name(values.dtype)}, expected {expected} of "
            f"{dtype_name(dtype)} for format {format} in panels"
        )
    c.sizes("values", shape, ["E", "N", "K"])
    c.same_device("values", values)
    return shape


def _check_plane(c: Checker, format: str, layout: Layout, name: str, plane: Tensor | None) -> None:
    """One plane beside the values: its shape, dtype, device and strides."""
    spec, groups = Spec(format), "subgroups" if name in SUB else "groups"
    panel_major = layout == "panels" and FORMATS[format].in_bit_planes
    if plane is None:
        shape = f"(E, N/64, {groups}, 64)" if panel_major else f"(E, {groups}, N)"
        raise c.error(f"{name} is None, expected {shape} for format {format}")
    dtypes = FORMATS[format].scales if name in ("scales", "minima") else (spec.dtype_of(name),)
    if not panel_major:
        c.tensor(name, plane, f"E {groups} N", dtypes)
    else:
        c.dims |= {"N/64": (c.size("N") // WIDTH, "values"), "64": (WIDTH, "layout")}
        c.tensor(name, plane, f"E N/64 {groups} 64", dtypes)
        if not plane.is_contiguous():
            c.fail(f"{name} has strides {plane.stride()}, expected them contiguous in panels")


def _check_groups(c: Checker, format: str, layout: Layout) -> None:
    planes, k = FORMATS[format].planes, c.size("K")
    for names, plane in (("groups", "scales"), ("subgroups", "subscales")):
        if plane in planes and (c.size(names) < 1 or k % c.size(names)):
            c.fail(f"{plane} has {c.size(names)} groups, expected a divisor of K={k}")
    finest = c.size("subgroups" if "subscales" in planes else "groups") if len(planes) > 1 else 1
    if "subscales" in planes and finest % c.size("groups"):
        c.fail(f"subscales has {finest} groups, expected a multiple of the {c.size('groups')} of scales")
    if layout == "panels" and FORMATS[format].in_bit_planes and k // finest % 16:
        c.fail(f"format {format} has groups of {k // finest} columns, expected a multiple of 16 in panels")


def unsupported(backend: str, args: Iterable[Any], layouts: Sequence[str]) -> str | None:
    """Why a backend with these layouts (and what `registry.taken` says) cannot take the weights among an op's
    arguments, if so."""
    takes = registry.taken(backend)
    weights = [a for a in args if isinstance(a, Weight)]
    for weight in weights:
        if weight.format not in takes.formats:
            return f"a weight has format {weight.format}, the {backend} backend takes {', '.join(takes.formats)}"
        if weight.layout not in layouts:
            return f"a weight has layout {weight.layout}, the {backend} backend takes {', '.join(layouts)}"
        if not takes.fp16_scales and weight.format == "int8" and weight.planes[1].dtype == FP16:
            return f"a weight of int8 has scales of float16, the {backend} backend takes those of float32"
    if not takes.mixed and len({weight.format for weight in weights}) > 1:
        named = " and ".join(weight.format for weight in weights)
        return f"the weights have formats {named}, the {backend} backend takes one for both"
    return None
