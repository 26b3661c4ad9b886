"""Weights as modules: empty when a model is built, filled by name from a checkpoint.

Matrices lie in memory in the layout that the device's kernels read fastest (`grok_kernels.wants_packed`). `write` takes
rows and `matrices` gives them back, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import grok_kernels
from grok_kernels.formats import FORMAT_OF


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class NamedTensor(nn.Module):
    """One tensor of a checkpoint in fp32: a norm's weight, or the router's."""

    weight: Tensor

    def __init__(self, name: str, *shape: int) -> None:
        super().__init__()
        self.name, self.shape = name, shape
        self.register_parameter("weight", None)

    def allocate(self, device: torch.device | str) -> None:
        """Make room, uninitialised."""
        self.hold(torch.empty(self.shape, dtype=torch.float32, device=device))

    def hold(self, weight: Tensor) -> None:
        """Take this tensor, of the module's shape, as `weight`."""
        self.weight = _parameter(weight)

    def release(self) -> None:
        """Let the memory go."""
        self.register_parameter("weight", None)

    def fill(self, source: Tensor, start: int = 0) -> None:
        """Copy the checkpoint's tensor into `weight`, or only its rows from `start` on."""
        self.weight[start : start + len(source)].copy_(source)


@dataclass(frozen=True, slots=True)
class Part:
    """A named matrix of a checkpoint, and the rows start..stop−1 of the fused weight that it fills."""

    name: str
    start: int
    stop: int


class FusedWeight(nn.Module):
    """E matrices (N, K) of one or more named matrices of a checkpoint, fused along N, as one `grok_kernels.Weight`.

    The planes of `weight` are the module's parameters, by their names. Matrices whose formats differ cannot be one
    weight: `divide` then makes submodules "0", "1", … of neighbouring ones, which hold them instead.
    """

    weight: grok_kernels.Weight

    def __init__(self, experts: int, k: int, parts: dict[str, int]) -> None:
        super().__init__()
        self.parts: list[Part] = []
        n = 0
        for name, rows in parts.items():
            self.parts.append(Part(name, n, n + rows))
            n += rows
        self.experts, self.n, self.k = experts, n, k

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        return self.experts, self.n, self.k

    def divide(self, counts: Sequence[int]) -> None:
        """Make a submodule for each run of so many parts, in their order; none for a single run."""
        self._modules.clear()
        parts = iter(self.parts)
        for i, count in enumerate(counts if len(counts) > 1 else ()):
            run = {part.name: part.stop - part.start for part in islice(parts, count)}
            self.add_module(str(i), FusedWeight(self.experts, self.k, run))

    @property
    def runs(self) -> list[FusedWeight]:
        """The modules that hold a weight, by rows: this one, or its submodules."""
        runs: Any = self._modules.values()
        return list(runs) or [self]

    @property
    def weights(self) -> list[grok_kernels.Weight]:
        """What the matrices are held in, by rows."""
        return [run.weight for run in self.runs]

    def layout_for(
        self, spec: grok_kernels.Spec, device: torch.device | str, packed: bool | None = None
    ) -> grok_kernels.Layout:
        """The layout of such a weight: panels where possible with `packed`, or with None where the device's kernels are
        faster for them; in either case only if each part can be packed by itself."""
        wants = grok_kernels.wants_packed
        sizes = [part.stop - part.start for part in self.parts]
        if packed is None:
            packs = all(wants(n, self.k, spec, device) for n in sizes)
        else:
            packs = packed and all(spec.can_pack(n, self.k) for n in sizes)
        return "panels" if packs else "rows"

    def allocate(self, spec: grok_kernels.Spec, device: torch.device | str, packed: bool | None = None) -> None:
        """Make room, uninitialised, for such a weight. packed: as for `layout_for`."""
        self.hold(grok_kernels.Weight.empty(spec, self.layout_for(spec, device, packed), self.shape, device))

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
            by_dtype = self.weight.format in FORMAT_OF.values()
            format = None if by_dtype else self.weight.format
            self.hold(grok_kernels.Weight.of(**planes, layout=self.weight.layout, format=format))
        return self

    def write(self, expert: int, start: int, planes: Mapping[str, Tensor]) -> None:
        """Rows of one expert's matrix, from `start` on, as `grok_kernels.Weight.write` takes them."""
        self.weight.write(expert, start, planes)

    def matrices(self) -> Tensor:
        """The values (E, N, K)."""
        return self.weight.with_layout("rows").values


def holders(model: nn.Module) -> Iterator[tuple[str, NamedTensor | FusedWeight]]:
    """The modules that hold weights, with their paths: of a divided one its submodules."""
    for path, module in model.named_modules():
        if isinstance(module, NamedTensor) or (isinstance(module, FusedWeight) and not module._modules):
            yield path, module
