"""grouped_gemm: with the few rows of decoding, with many, and with int8 activations, quantising included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

import grok_kernels

from . import peers
from .data import EXPERTS, Rows, Weights, routings
from .harness import Contestant, Setup, Way, copies
from .machine import last_cache_bytes

Product = Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Gemm:
    """Tokens routed to 2 of 8 experts, or `rows` for each of 2 experts: x (M, K) · weights (E, N, K)."""

    k: int
    n: int
    fmt: str
    arithmetic: str = "bf16"
    tokens: int = 0
    rows: int = 0
    cache_bytes: int | None = None  # that the copies have to exceed; None: this machine's

    @property
    def op(self) -> str:
        return "grouped_gemm"

    @property
    def name(self) -> str:
        if self.tokens:
            return f"decode-{self.fmt}-k{self.k}-n{self.n}-t{self.tokens}"
        family = "gemm" if self.arithmetic == "bf16" else "gemm_int8"
        return f"{family}-{self.fmt}-k{self.k}-n{self.n}-m{self.rows}"

    def small(self) -> Gemm:
        return replace(self, k=128, n=128, rows=min(self.rows, 4), cache_bytes=0)

    def _rows(self) -> list[Rows]:
        """Of successive calls."""
        if self.tokens:
            return [Rows.of(experts) for experts in routings(self.tokens)]
        return [Rows.even(2, self.rows)]

    def build(self) -> Setup:
        cache_bytes = last_cache_bytes() if self.cache_bytes is None else self.cache_bytes
        experts = EXPERTS if self.tokens else 2
        weights, ways = prepare(experts, self.n, self.k, self.fmt, self.arithmetic, cache_bytes)
        rows = self._rows()
        matrix, bounds = self.n * self.k, rows[0].bounds
        x_MK = torch.randn(rows[0].total, self.k).bfloat16()

        def expected() -> Tensor:
            return torch.cat([x_MK[bounds[e] : bounds[e + 1]].float() @ weights.float(e).t() for e in rows[0].hit])

        def contestant(way: Way[Product]) -> Contestant:
            return way.contestant(
                call=lambda i: way.copies[i // len(rows) % len(way.copies)](x_MK, rows[i % len(rows)]),
                expected=expected,
                size=len(rows[0].hit) * matrix * way.weight_bytes + x_MK.nbytes,
            )

        return Setup(
            operations=2 * rows[0].total * matrix,
            bytes=len(rows[0].hit) * matrix + x_MK.nbytes,
            arithmetic=self.arithmetic,
            contestants=[contestant(way) for way in ways],
        )


@lru_cache(maxsize=1)  # problems that differ in their rows alone come one after another
def prepare(
    experts: int, n: int, k: int, fmt: str, arithmetic: str, cache_bytes: int
) -> tuple[Weights, list[Way[Product]]]:
    """Weights, and every contestant with copies of them as it wants them."""
    weights = Weights.random(experts, n, k, fmt)
    size = experts * n * k
    tolerance = peers.INT8_ERROR if arithmetic == "int8" else peers.BF16_ERROR
    ways = [Way.ours(tolerance, copies(partial(_ours, weights, arithmetic), size, cache_bytes))]
    for p in peers.grouped(fmt, arithmetic):
        made = [] if p.missing else copies(partial(_theirs, p, weights), size * p.weight_bytes, cache_bytes)
        ways.append(Way(p.name, made, p.weight_bytes, p.tolerance, p.missing))
    return weights, ways


def _theirs(peer: peers.Peer, weights: Weights) -> Product:
    packed = peer.pack(weights)
    return lambda x_MK, rows: peer.run(x_MK, packed, rows)


def _ours(weights: Weights, arithmetic: str) -> Product:
    packed = grok_kernels.pack_weight(weights.values)

    def product(x_MK: Tensor, rows: Rows) -> Tensor:
        if arithmetic == "bf16":
            return grok_kernels.grouped_gemm(x_MK, packed, weights.scale, rows.offsets)
        q_MK, scale = grok_kernels.quantize_int8(x_MK)
        return grok_kernels.grouped_gemm(q_MK, packed, weights.scale, rows.offsets, scale)

    return product


SHAPES = ((1536, 8192), (6144, 4096))

PROBLEMS = (
    *(Gemm(k, n, fmt, tokens=t) for k, n in SHAPES for fmt in ("int8", "fp8") for t in (1, 4)),
    *(Gemm(k, n, fmt, rows=m) for k, n in SHAPES for fmt in ("int8", "fp8") for m in (16, 128, 512, 2048)),
    *(Gemm(k, n, "int8", "int8", rows=m) for k, n in SHAPES for m in (16, 128, 512)),
)
