"""The whole expert layer, top-2 of 8: gate and up products, activation, down product, weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

import grok_kernels

from . import peers, peers_vllm
from .data import ACTIVE, EXPERTS, Rows, Weights, routings
from .harness import Contestant, Setup, Way, copies
from .machine import last_cache_bytes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


@dataclass(frozen=True)
class Routed:
    """One call's routing, as each contestant likes it. Made outside of the times, to the peers' good."""

    experts_TA: Tensor
    weights_TA: Tensor
    rows: Rows
    tokens: Tensor  # of each grouped row
    weights: Tensor

    @classmethod
    def of(cls, experts_TA: Tensor, weights_TA: Tensor) -> Routed:
        order = experts_TA.flatten().argsort(stable=True)
        return cls(experts_TA, weights_TA, Rows.of(experts_TA), order // ACTIVE, weights_TA.flatten()[order])


Layer = Callable[[Tensor, Routed], Tensor]


@dataclass(frozen=True)
class Moe:
    d: int
    f: int
    fmt: str
    act_format: str
    tokens: int
    cache_bytes: int | None = None

    @property
    def op(self) -> str:
        return "moe"

    @property
    def name(self) -> str:
        family = "moe_int8" if self.act_format == "int8" else "moe"
        return f"{family}-{self.fmt}-d{self.d}-f{self.f}-t{self.tokens}"

    def small(self) -> Moe:
        return replace(self, d=128, f=128, tokens=min(self.tokens, 4), cache_bytes=0)

    def build(self) -> Setup:
        cache_bytes = last_cache_bytes() if self.cache_bytes is None else self.cache_bytes
        w13, w2, ways = prepare(self.d, self.f, self.fmt, self.act_format, cache_bytes)
        x_TD = torch.randn(self.tokens, self.d).bfloat16()
        weights_TA = torch.rand(self.tokens, ACTIVE) + 0.1
        routed = [Routed.of(experts, weights_TA) for experts in routings(self.tokens)]
        read = len(routed[0].rows.hit) * 3 * self.d * self.f

        def contestant(way: Way[Layer]) -> Contestant:
            activation = "silu" if way.name in peers_vllm.SILU_ONLY else "gelu_tanh"
            return way.contestant(
                call=lambda i: way.copies[i // len(routed) % len(way.copies)](x_TD, routed[i % len(routed)]),
                expected=lambda: expert_layer(x_TD, routed[0], w13, w2, activation),
                size=read * way.weight_bytes + x_TD.nbytes,
            )

        return Setup(
            operations=2 * self.tokens * ACTIVE * 3 * self.d * self.f,
            bytes=read + x_TD.nbytes,
            arithmetic=_arithmetic(self.act_format),
            contestants=[contestant(way) for way in ways],
        )


def _arithmetic(act_format: str) -> str:
    return "int8" if act_format == "int8" else "bf16"


@lru_cache(maxsize=1)  # problems that differ in their tokens alone come one after another
def prepare(d: int, f: int, fmt: str, act_format: str, cache_bytes: int) -> tuple[Weights, Weights, list[Way[Layer]]]:
    """Weights w13 and w2, and every contestant with copies of them as it wants them."""
    w13, w2 = Weights.random(EXPERTS, 2 * f, d, fmt), Weights.random(EXPERTS, d, f, fmt)
    size, arithmetic = EXPERTS * 3 * d * f, _arithmetic(act_format)
    tolerance = peers.INT8_ERROR if arithmetic == "int8" else peers.BF16_ERROR
    ways = [Way.ours(tolerance, copies(partial(_ours, w13, w2, act_format), size, cache_bytes))]
    others: list[tuple[peers.Peer | peers_vllm.Layer, Callable[[], Layer]]] = []
    others += [(p, partial(_composed, p, w13, w2)) for p in peers.grouped(fmt, arithmetic)]
    others += [(p, partial(_fused, p, w13, w2)) for p in peers_vllm.layers(fmt, arithmetic)]
    for p, make in others:
        made = [] if p.missing else copies(make, size * p.weight_bytes, cache_bytes)
        ways.append(Way(p.name, made, p.weight_bytes, p.tolerance, p.missing))
    return w13, w2, ways


def expert_layer(x_TD: Tensor, routed: Routed, w13: Weights, w2: Weights, activation: str) -> Tensor:
    """In fp32."""
    y_TD = torch.zeros(x_TD.shape)
    for e in routed.rows.hit:
        part = slice(routed.rows.bounds[e], routed.rows.bounds[e + 1])
        tokens = routed.tokens[part]
        gate, up = (x_TD[tokens].float() @ w13.float(e).t()).chunk(2, dim=-1)
        out = (ACTIVATIONS[activation](gate) * up) @ w2.float(e).t()
        y_TD.index_add_(0, tokens, out * routed.weights[part, None])
    return y_TD


def _ours(w13: Weights, w2: Weights, act_format: str) -> Layer:
    packed13, packed2 = grok_kernels.pack_weight(w13.values), grok_kernels.pack_weight(w2.values)
    return lambda x_TD, routed: grok_kernels.moe(
        x_TD, routed.weights_TA, routed.experts_TA, packed13, w13.scale, packed2, w2.scale, "gelu_tanh", act_format
    )


def _composed(peer: peers.Peer, w13: Weights, w2: Weights) -> Layer:
    """A layer of two grouped products of a peer, the rest in torch."""
    packed13, packed2 = peer.pack(w13), peer.pack(w2)

    def layer(x_TD: Tensor, routed: Routed) -> Tensor:
        gate, up = peer.run(x_TD[routed.tokens], packed13, routed.rows).chunk(2, dim=-1)
        out = peer.run(functional.gelu(gate, approximate="tanh") * up, packed2, routed.rows)
        weighted = out.float() * routed.weights[:, None]
        return torch.zeros(x_TD.shape).index_add_(0, routed.tokens, weighted).to(x_TD.dtype)

    return layer


def _fused(layer: peers_vllm.Layer, w13: Weights, w2: Weights) -> Layer:
    packed = layer.pack(w13, w2)
    return lambda x_TD, routed: layer.run(x_TD, routed.weights_TA, routed.experts_TA, packed)


KINDS = (("int8", "none"), ("fp8", "none"), ("int8", "int8"))  # of weights, and of activations

PROBLEMS = tuple(Moe(d, 4096, *kind, t) for d in (1536, 6144) for kind in KINDS for t in (1, 16, 64, 512))
