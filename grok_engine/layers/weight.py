"""Weights as modules: empty when a model is built, filled by name from a checkpoint.

Large matrices are held in the form that the device's kernels want (`grok_kernels.wants_packed`); `write` takes rows and
`matrices`, `values` give them back in whichever.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import grok_kernels


def parameter(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Room for one, uninitialised."""
    return nn.Parameter(grok_kernels.weight_memory(shape, dtype, device), requires_grad=False)


def holds_packed(n: int, k: int, dtype: torch.dtype, device: torch.device | str, packed: bool | None) -> bool:
    """Whether to hold matrices (n, k) packed, where `packed` asks for it, or None leaves it to the device's kernels."""
    if packed is None:
        return grok_kernels.wants_packed(n, k, dtype, device)
    return packed and grok_kernels.can_pack(n, k, dtype)


class Table(nn.Module):
    """One tensor of a checkpoint, taken whole: a norm's weight, the router, the embedding."""

    weight: Tensor

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.name, self.shape = name, shape
        self.register_parameter("weight", None)

    def form(self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None) -> tuple[int, ...]:
        """The shape of `weight`: `shape`, or, for a table that can be packed, as for `Weight.form`."""
        return self.shape

    def allocate(self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None) -> None:
        """Make room, uninitialised. packed: as for `form`."""
        self.weight = parameter(self.form(dtype, device, packed), dtype, device)

    def held(self) -> Tensor:
        """`weight`, sooner: nn.Module looks for it in three places, at each of the many times in a step."""
        weight = self._parameters["weight"]
        assert weight is not None, f"{self.name} was not loaded"
        return weight

    def fill(self, source: Tensor) -> None:
        """Take the checkpoint's tensor."""
        self.weight.copy_(source)

    def values(self) -> Tensor:
        """The tensor in its `shape`."""
        return self.weight


@dataclass(frozen=True, slots=True)
class Part:
    """A named matrix of a checkpoint, and the rows start..stop−1 of the fused weight that it fills."""

    name: str
    start: int
    stop: int


class Weight(nn.Module):
    """E matrices (N, K), K-major, of one or more named matrices fused along N; for 8-bit types with scales
    (E, groups, N), groups of K/groups columns."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, experts: int, k: int, parts: dict[str, int]) -> None:
        super().__init__()
        self.parts: list[Part] = []
        n = 0
        for name, rows in parts.items():
            self.parts.append(Part(name, n, n + rows))
            n += rows
        self.experts, self.n, self.k = experts, n, k
        self.register_parameter("weight", None)
        self.register_parameter("scale", None)

    def form(self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None) -> tuple[int, ...]:
        """The shape of `weight`: packed where there is such a form, or, for None, where the device's kernels want it.

        Either way only if each part can be packed by itself.
        """
        shape = (self.experts, self.n, self.k)
        if all(holds_packed(part.stop - part.start, self.k, dtype, device, packed) for part in self.parts):
            return grok_kernels.packed_shape(*shape, dtype)
        return shape

    def allocate(self, dtype: torch.dtype, groups: int, device: torch.device | str, packed: bool | None = None) -> None:
        """Make room, uninitialised, for `dtype` values; `groups` 0 is no scales. packed: as for `form`."""
        self.weight = parameter(self.form(dtype, device, packed), dtype, device)
        if groups:
            self.scale = parameter((self.experts, groups, self.n), torch.float32, device)

    def write(self, expert: int, start: int, rows_NK: Tensor) -> None:
        """Rows of one expert's matrix, from `start` on."""
        if grok_kernels.is_packed(self.weight):
            grok_kernels.pack_into(rows_NK[None].to(self.weight.dtype), self.weight[expert : expert + 1], start)
        else:
            self.weight[expert, start : start + rows_NK.shape[0]].copy_(rows_NK)

    def held(self) -> tuple[Tensor, Tensor | None]:
        """`weight` and `scale`; as for a table."""
        weight = self._parameters["weight"]
        assert weight is not None, f"{self.parts[0].name} was not loaded"
        return weight, self._parameters["scale"]

    def matrices(self) -> Tensor:
        """(E, N, K)."""
        return grok_kernels.unpack_weight(self.weight)
