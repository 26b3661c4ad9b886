"""Weights as modules: empty when a model is built, filled by name from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Table(nn.Module):
    """One tensor of a checkpoint, taken whole: a norm's weight, the router, the embedding.

    `transposed` says that the checkpoint holds it the other way round, (in, out).
    """

    weight: Tensor

    def __init__(self, name: str, *shape: int, transposed: bool = False) -> None:
        super().__init__()
        self.name, self.shape, self.transposed = name, shape, transposed
        self.register_parameter("weight", None)

    def allocate(self, dtype: torch.dtype, device: torch.device | str) -> None:
        """Make room, uninitialised."""
        self.weight = nn.Parameter(torch.empty(self.shape, dtype=dtype, device=device), requires_grad=False)


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

    def allocate(self, dtype: torch.dtype, groups: int, device: torch.device | str) -> None:
        """Make room, uninitialised, for `dtype` values; `groups` 0 is no scales."""
        shape = (self.experts, self.n, self.k)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
        if groups:
            scale = torch.empty((self.experts, groups, self.n), dtype=torch.float32, device=device)
            self.scale = nn.Parameter(scale, requires_grad=False)
