"""Random weights, and which rows go to which expert."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

EXPERTS, ACTIVE = 8, 2
BLOCK = 128  # outputs that share a scale: what a scale per channel and a scale per block can both say


@dataclass(frozen=True)
class Weights:
    """Matrices (E, N, K) of int8 or e4m3, and scales (E, 1, N) with which a product of normal rows is about normal."""

    values: Tensor
    scale: Tensor

    @classmethod
    def random(cls, experts: int, n: int, k: int, fmt: str) -> Weights:
        make = {"int8": _random_int8, "fp8": _random_fp8}[fmt]
        values = torch.stack([make(n, k) for _ in range(experts)])
        rms = 73.3 if fmt == "int8" else 64.0
        blocks = (torch.rand(experts, 1, -(-n // BLOCK)) + 0.5) / (rms * k**0.5)
        return cls(values, blocks.repeat_interleave(BLOCK, dim=2)[..., :n].contiguous())

    @property
    def count(self) -> int:
        return self.values.shape[0]

    def float(self, expert: int) -> Tensor:
        """One matrix, (N, K) fp32."""
        return self.values[expert].float() * self.scale[expert].t()

    def bf16(self) -> Tensor:
        """All of them, (E, N, K), rounded."""
        return torch.stack([self.float(e).bfloat16() for e in range(self.count)])


def _random_int8(n: int, k: int) -> Tensor:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8)


def _random_fp8(n: int, k: int) -> Tensor:
    return (torch.randn(n, k) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Rows:
    """Rows in the order of their experts: expert e has bounds[e]..bounds[e + 1]."""

    bounds: list[int]

    @classmethod
    def even(cls, experts: int, each: int) -> Rows:
        return cls([each * e for e in range(experts + 1)])

    @classmethod
    def of(cls, experts: Tensor, count: int = EXPERTS) -> Rows:
        """Of experts (T, A)."""
        return cls([0, *torch.bincount(experts.flatten(), minlength=count).cumsum(0).tolist()])

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def hit(self) -> list[int]:
        return [e for e in range(len(self.bounds) - 1) if self.bounds[e + 1] > self.bounds[e]]

    @cached_property
    def offsets(self) -> Tensor:
        """(E + 1,) int32."""
        return torch.tensor(self.bounds, dtype=torch.int32)


def routings(tokens: int) -> list[Tensor]:
    """Experts (T, 2) of successive calls: the same loads on other experts, so that one token's are cold each time."""
    first = torch.stack([torch.randperm(EXPERTS)[:ACTIVE] for _ in range(tokens)])
    if tokens == 1:
        first = torch.tensor([[0, 1]])
    return [((first + ACTIVE * i) % EXPERTS).int() for i in range(EXPERTS // ACTIVE)]
