"""Weights as modules: empty when a model is built, filled by name from a checkpoint.

Matrices lie in memory in the layout that the device's kernels read fastest (`grok_kernels.wants_packed`). `write` takes
rows and `matrices`, `values` give them back, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import grok_kernels
from grok_kernels.dtypes import NAMES


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def packs(n: int, k: int, dtype: torch.dtype, device: torch.device | str, packed: bool | None) -> bool:
    """Whether matrices (n, k) go into panels: with `packed` wherever they can, with None where the device's kernels are
    faster for it."""
    if packed is None:
        return grok_kernels.wants_packed(n, k, grok_kernels.Spec(NAMES[dtype]), device)
    return packed and grok_kernels.can_pack(n, k, dtype)


class NamedTensor(nn.Module):
    """One tensor of a checkpoint as it stands: a norm's weight, the router, the embedding."""

    weight: Tensor

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.name, self.shape = name, shape
        self.layout: grok_kernels.Layout = "rows"
        self.register_parameter("weight", None)

    def layout_for(
        self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None
    ) -> grok_kernels.Layout:
        """The layout of `weight` on this device. packed: as for `FusedWeight.layout_for`."""
        return "rows"

    def shape_in(self, layout: grok_kernels.Layout, dtype: torch.dtype) -> tuple[int, ...]:
        """The shape of `weight` in this layout."""
        return self.shape

    def allocate(self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None) -> None:
        """Make room, uninitialised, in the layout of `layout_for`."""
        layout = self.layout_for(dtype, device, packed)
        self.hold(grok_kernels.weight_memory(self.shape_in(layout, dtype), dtype, device), layout)

    def hold(self, weight: Tensor, layout: grok_kernels.Layout = "rows") -> None:
        """Take this tensor, which has the shape of `shape_in`, as `weight`."""
        self.layout = layout
        self.weight = _parameter(weight)

    def release(self) -> None:
        """Let the memory go."""
        self.register_parameter("weight", None)

    def fill(self, source: Tensor, start: int = 0) -> None:
        """Copy the checkpoint's tensor into `weight`, or only its rows from `start` on."""
        self.weight[start : start + len(source)].copy_(source)

    def values(self) -> Tensor:
        """The tensor in its `shape`."""
        return self.weight


@dataclass(frozen=True, slots=True)
class Part:
    """A named matrix of a checkpoint, and the rows start..stop−1 of the fused weight that it fills."""

    name: str
    start: int
    stop: int


class FusedWeight(nn.Module):
    """E matrices (N, K) of one or more named matrices of a checkpoint, fused along N, as one `grok_kernels.Weight`.

    The planes of `weight` are the module's parameters `values` and, for formats with scales, `scales`.
    """

    weight: grok_kernels.Weight
    values: Tensor

    def __init__(self, experts: int, k: int, parts: dict[str, int]) -> None:
        super().__init__()
        self.parts: list[Part] = []
        n = 0
        for name, rows in parts.items():
            self.parts.append(Part(name, n, n + rows))
            n += rows
        self.experts, self.n, self.k = experts, n, k

    def layout_for(
        self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None
    ) -> grok_kernels.Layout:
        """The layout of the values: panels where possible with `packed`, or with None where the device's kernels are
        faster for them; in either case only if each part can be packed by itself."""
        packs_all = all(packs(part.stop - part.start, self.k, dtype, device, packed) for part in self.parts)
        return "panels" if packs_all else "rows"

    def shape_in(self, layout: grok_kernels.Layout, dtype: torch.dtype) -> tuple[int, ...]:
        """The shape of the values in this layout."""
        return grok_kernels.values_shape(layout, self.experts, self.n, self.k, NAMES[dtype])

    def allocate(self, dtype: torch.dtype, groups: int, device: torch.device | str, packed: bool | None = None) -> None:
        """Make room, uninitialised, for values of `dtype` and so many groups of scales; 0 for formats without.

        packed: as for `layout_for`.
        """
        layout = self.layout_for(dtype, device, packed)
        values = grok_kernels.weight_memory(self.shape_in(layout, dtype), dtype, device)
        scales = None
        if groups:
            scales = grok_kernels.weight_memory((self.experts, groups, self.n), torch.float32, device)
        self.hold(grok_kernels.Weight.of(values, scales, layout))

    def hold(self, weight: grok_kernels.Weight) -> None:
        """Take this weight, of shape (E, N, K)."""
        self._parameters.clear()
        for name, plane in weight.named_planes().items():
            self.register_parameter(name, _parameter(plane))
        self.weight = grok_kernels.Weight(weight.format, weight.layout, weight.shape, tuple(self.parameters()))

    def release(self) -> None:
        """Let the memory go."""
        self._parameters.clear()
        del self.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedWeight:
        """As of every module; the weight is checked anew, since its planes have other devices or dtypes."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._parameters:
            planes: dict[str, Any] = dict(self._parameters)
            self.hold(grok_kernels.Weight.of(**planes, layout=self.weight.layout))
        return self

    def write(self, expert: int, start: int, rows_NK: Tensor) -> None:
        """Rows of one expert's matrix, from `start` on."""
        values = self.weight.values
        if self.weight.layout == "panels":
            grok_kernels.pack_into(rows_NK[None].to(values.dtype), values[expert : expert + 1], start)
        else:
            values[expert, start : start + rows_NK.shape[0]].copy_(rows_NK)

    def matrices(self) -> Tensor:
        """The values (E, N, K)."""
        return self.weight.with_layout("rows").values
