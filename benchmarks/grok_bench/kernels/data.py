"""Random weights, and which rows go to which expert."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

BLOCK = 128  # outputs that share a scale, so that scales per channel and per block can both express it
BYTES = {"int8": 1, "fp8": 1, "bf16": 2}
T = TypeVar("T")


_kept: dict[tuple[Hashable, ...], Any] = {}


def kept(key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """What `make` makes, kept until another key is asked for: successive problems often differ in their rows alone.

    key[0] is the op of the problem.
    """
    if key not in _kept:
        _kept.clear()  # freed before the next is made: two may not fit
        _kept[key] = make()
    found: T = _kept[key]
    return found


def forget(op: str = "") -> None:
    """Free what is kept, unless problems of `op` may use it."""
    if not any(key[0] == op for key in _kept):
        _kept.clear()


class Once:
    """What is computed once from this object, by name, for all calls and problems that share it."""

    @cached_property
    def _made(self) -> dict[str, Any]:
        return {}

    def once(self, name: str, make: Callable[[Any], T]) -> T:
        if name not in self._made:
            self._made[name] = make(self)
        found: T = self._made[name]
        return found


@dataclass(frozen=True)
class Weights(Once):
    """Random matrices (E, N, K) in int8, e4m3 or bf16, with scales (E, 1, N), or None for bf16.

    A product with normal rows is about normal.
    """

    values: Tensor
    scale: Tensor | None

    @classmethod
    def random(cls, experts: int, n: int, k: int, fmt: str, device: str = "cpu") -> Weights:
        if fmt == "bf16":
            made = [(torch.randn(n, k, device=device) / k**0.5).bfloat16() for _ in range(experts)]
            return cls(torch.stack(made), None)
        make = {"int8": _random_int8, "fp8": _random_fp8}[fmt]
        values = torch.stack([make(n, k, device) for _ in range(experts)])
        rms = 73.3 if fmt == "int8" else 64.0
        blocks = (torch.rand(experts, 1, -(-n // BLOCK), device=device) + 0.5) / (rms * k**0.5)
        return cls(values, blocks.repeat_interleave(BLOCK, dim=2)[..., :n].contiguous())

    @property
    def count(self) -> int:
        return self.values.shape[0]

    def float(self, expert: int) -> Tensor:
        """One matrix, (N, K) fp32."""
        values = self.values[expert].float()
        return values if self.scale is None else values * self.scale[expert].t()

    def bf16(self) -> Tensor:
        """All matrices, (E, N, K), rounded to bf16."""
        if self.scale is None:
            return self.values
        return torch.stack([self.float(e).bfloat16() for e in range(self.count)])


def _random_int8(n: int, k: int, device: str) -> Tensor:
    return torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)


def _random_fp8(n: int, k: int, device: str) -> Tensor:
    return (torch.randn(n, k, device=device) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)


@dataclass(frozen=True)
class Rows:
    """Grouped rows: expert e has those from bounds[e] to bounds[e + 1]."""

    bounds: list[int]
    device: str = "cpu"

    @classmethod
    def of(cls, experts: Tensor, count: int) -> Rows:
        """The rows of experts (T, A)."""
        counts = torch.bincount(experts.flatten().long(), minlength=count)
        return cls([0, *counts.cumsum(0).tolist()], str(experts.device))

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @property
    def hit(self) -> list[int]:
        return [e for e in range(len(self.bounds) - 1) if self.bounds[e + 1] > self.bounds[e]]

    @cached_property
    def offsets(self) -> Tensor:
        """(E + 1,) int32."""
        return torch.tensor(self.bounds, dtype=torch.int32, device=self.device)

    def part(self, expert: int) -> slice:
        return slice(self.bounds[expert], self.bounds[expert + 1])


def routing(kind: str, tokens: int, experts: int, active: int, turn: int, device: str = "cpu") -> Tensor:
    """Experts (T, A) int32 of the `turn`-th call; each turn puts the same loads on other experts.

    even: the same rows for each; zipf: probability 1 / rank, an expert at most once a token; one: every row on one.
    """
    if kind == "even":
        chosen = torch.arange(tokens * active).view(tokens, active)[torch.randperm(tokens)]
    elif kind == "zipf":
        rank = -torch.arange(1, experts + 1).log() - torch.rand(tokens, experts).log().neg().log()  # Gumbel's top k
        chosen = rank.topk(active).indices
    else:
        chosen = torch.zeros(tokens, active, dtype=torch.long)
    return ((chosen + active * turn) % experts).int().to(device)
