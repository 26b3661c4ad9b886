"""Random weights, and which rows go to which expert."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from math import gcd, prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from grok_kernels.formats import FORMATS, Spec
from grok_kernels.reference.quantize import dequantize_planes, group_scales

BLOCK = 128  # outputs that share a scale, so that scales per channel and per block can both express it
BYTES = {"int8": 1, "fp8": 1, "bf16": 2}
# Formats with scales by groups of columns: as `grok_kernels` names them, columns that share a scale, and a subscale.
GROUPED = {
    "int8_g32": ("int8", 32, 0),
    "int4": ("int4", 32, 0),
    "int4_g128": ("int4", 128, 0),
    "int4_zero": ("int4_zero", 128, 0),
    "int4_min": ("int4_min", 32, 0),
    "int4_k": ("int4_k", 256, 32),
    "int5": ("int5", 32, 0),
    "int5_min": ("int5_min", 32, 0),
    "int5_k": ("int5_k", 256, 32),
    "int6_k": ("int6_k", 256, 16),
}
T = TypeVar("T")


def spec(fmt: str, k: int) -> Spec:
    """A format of GROUPED for K columns, which need not be whole groups: then groups have fewer columns. Scales are
    fp16."""
    name, columns, sub = GROUPED[fmt]
    return Spec(name, k // gcd(k, columns), k // gcd(k, sub) if sub else 0, torch.float16)


def weight_bytes(fmt: str, k: int, in_rows: bool = False) -> float:
    """Bytes of a weight with its share of the scales of GROUPED; in_rows: where each value takes a byte."""
    if fmt not in GROUPED:
        return BYTES[fmt]
    s = spec(fmt, k)
    _, *scales = s.planes("rows", (1, 1, k)).values()
    bits = 8 if in_rows else FORMATS[s.format].bits
    return bits / 8 + sum(prod(shape) * dtype.itemsize for shape, dtype in scales) / k


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
    """Random matrices (E, N, K) in a format of `grok_kernels`: its planes in rows, by their names.

    A product with normal rows is about normal.
    """

    format: str
    planes: dict[str, Tensor]

    @classmethod
    def random(cls, experts: int, n: int, k: int, fmt: str, device: str = "cpu") -> Weights:
        """fmt: one of BYTES, of which int8 and fp8 have scales (E, 1, N), or of GROUPED."""
        if fmt in GROUPED:
            return cls(GROUPED[fmt][0], _random_planes(spec(fmt, k), experts, n, k, device))
        if fmt == "int8":
            values, rms = torch.randint(-127, 128, (experts, n, k), dtype=torch.int8, device=device), 73.3
        else:
            rms = 64.0 if fmt == "fp8" else k**-0.5
            values = torch.empty(experts, n, k, dtype=torch.bfloat16, device=device).normal_(std=rms)
        if fmt == "bf16":
            return cls(fmt, {"values": values})
        if fmt == "fp8":
            values = values.clamp_(-448, 448).to(torch.float8_e4m3fn)
        blocks = (torch.rand(experts, 1, -(-n // BLOCK), device=device) + 0.5) / (rms * k**0.5)
        scales = blocks.repeat_interleave(BLOCK, dim=2)[..., :n].contiguous()
        return cls({"fp8": "fp8_e4m3"}.get(fmt, fmt), {"values": values, "scales": scales})

    @property
    def values(self) -> Tensor:
        return self.planes["values"]

    @property
    def scale(self) -> Tensor:
        """(E, groups, N)."""
        return self.planes["scales"]

    @property
    def count(self) -> int:
        return self.values.shape[0]

    def planes_of(self, expert: int) -> dict[str, Tensor]:
        """The planes of one matrix."""
        return {name: plane[expert] for name, plane in self.planes.items()}

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """S and M of one matrix, (N, groups) fp32: its weights are S · values − M."""
        scales, minima = group_scales(self.planes_of(expert))
        return scales.t(), (torch.zeros_like(scales) if minima is None else minima).t()

    def float(self, expert: int) -> Tensor:
        """One matrix, (N, K) fp32."""
        return dequantize_planes(self.planes_of(expert))

    def bf16(self) -> Tensor:
        """All matrices, (E, N, K), rounded to bf16."""
        if self.format == "bf16":
            return self.values
        return torch.stack([self.float(e).bfloat16() for e in range(self.count)])


def _random_planes(spec: Spec, experts: int, n: int, k: int, device: str) -> dict[str, Tensor]:
    """Each of the format's integers is as likely as another, and minima put their middle at about 0."""
    format, planes = FORMATS[spec.format], dict[str, Tensor]()
    count = 1 << format.bits
    middle = count // 2 - format.zero_point if format.in_bit_planes else 0
    second = 32 if spec.subgroups else 1  # about the size of subscales and subminima
    most = {"zeros": 17, "subscales": 64, "subminima": 64}
    for name, (shape, dtype) in spec.planes("rows", (experts, n, k)).items():
        if name == "values":
            low = middle - count // 2
            planes[name] = torch.randint(low, low + count, shape, dtype=dtype, device=device)
        elif name in most:
            low = -most[name] if format.signed else 0
            planes[name] = torch.randint(low, most[name], shape, dtype=dtype, device=device)
        else:
            scales = (torch.rand(shape, device=device) + 0.5) / (0.3 * count * second * k**0.5)
            if name == "minima":  # of one level, they are added
                scales *= middle if spec.subgroups else -middle
            planes[name] = scales.to(dtype)
    return planes


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
