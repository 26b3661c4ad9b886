"""The whole expert layer: gate and up products, activation, down product, weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .case import BF16_ERROR, EIGHT_BIT_ERROR, TURNS, Case, copies
from .data import GROUPED, Rows, Weights, kept, routing, weight_bytes
from .gemm import parts, product
from .ours import quantize
from .problems import ROUTINGS, TOKENS, Problem, family

FORMATS = ("bf16", "int8", "fp8", "int8dyn", "fp8dyn", *GROUPED, *(f"{fmt}dyn" for fmt in GROUPED))
DETAILS = "{format}-{routing}-t{tokens}"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
    "silu": functional.silu,
}


@dataclass(frozen=True)
class Layer:
    """One call. The grouped rows, their tokens and weights are computed untimed, for peers that cannot group."""

    x_TD: Tensor
    topk_weights: Tensor
    experts: Tensor
    w13: Weights
    w2: Weights
    activation: str
    fmt: str

    @property
    def args(self) -> tuple[Any, ...]:
        act_format = parts(self.fmt)[1] if self.fmt.endswith("dyn") else "none"
        return self.x_TD, self.topk_weights, self.experts, self.w13, self.w2, self.activation, act_format

    def flip(self) -> None:
        """As `case.flip`."""
        self.x_TD.copy_(self.x_TD.flip(-1))

    @cached_property
    def order(self) -> Tensor:
        return self.experts.flatten().argsort(stable=True)

    @cached_property
    def rows(self) -> Rows:
        return Rows.of(self.experts, self.w13.count)

    @cached_property
    def tokens(self) -> Tensor:
        """The token of each grouped row."""
        return self.order // self.experts.shape[1]

    @cached_property
    def weights(self) -> Tensor:
        """The weight of each grouped row."""
        return self.topk_weights.flatten()[self.order]


@dataclass(frozen=True)
class QuantizedLayer(Layer):
    """One call of `moe_fp8`: the rows are in e4m3 before it."""

    @cached_property
    def quantized(self) -> tuple[Tensor, Tensor]:
        return quantize(self.x_TD, "fp8")

    def flip(self) -> None:
        super().flip()
        for old, new in zip(self.quantized, quantize(self.x_TD, "fp8"), strict=True):
            old.copy_(new)

    @property
    def args(self) -> tuple[Any, ...]:
        return (*self.quantized, *super().args[1:-1])


def _each(p: Problem, fmt: str, in_rows: bool = False) -> float:
    """Bytes of a weight of the layer: two thirds of them have rows of D, the others of F."""
    return (2 * weight_bytes(fmt, p.shape.d_model, in_rows) + weight_bytes(fmt, p.shape.d_ff, in_rows)) / 3


def footprint(p: Problem) -> float:
    m = p.shape
    rows = p.number("tokens") * m.num_experts_per_tok
    fmt = parts(str(p["format"]))[0]
    stored = 3 * m.num_experts * m.d_model * m.d_ff
    # the weights and our packed copy, and one matrix in fp32, three times
    return (
        stored * (_each(p, fmt, in_rows=True) + _each(p, fmt))
        + 24 * m.d_model * m.d_ff
        + TURNS * 2 * rows * m.d_model
        + 12 * rows * m.d_ff
    )


@family("moe", DETAILS, {"format": FORMATS, "routing": ROUTINGS, "tokens": TOKENS}, footprint=footprint)
@family("moe_fp8", DETAILS, {"format": ("fp8xfp8",), "routing": ROUTINGS, "tokens": TOKENS}, footprint=footprint)
def build(p: Problem, device: str, cold: int) -> Case:
    m, t, fmt = p.shape, p.number("tokens"), str(p["format"])
    e, a, d, f = m.num_experts, m.num_experts_per_tok, m.d_model, m.d_ff
    weight_format, row_format = parts(fmt)
    each, stored = _each(p, weight_format), e * 3 * d * f

    def pair() -> tuple[Weights, Weights]:
        sizes = ((2 * f, d), (d, f))
        w13, w2 = (Weights.random(e, n, k, weight_format, device) for n, k in sizes)
        return w13, w2

    pairs = kept(
        (p.op, e, d, f, weight_format, device, cold),
        lambda: [pair() for _ in range(copies(stored * each, cold))],
    )
    made, row_bytes = (QuantizedLayer, 1) if p.op == "moe_fp8" else (Layer, 2)
    inputs = [
        made(
            torch.randn(t, d, device=device).bfloat16(), torch.rand(t, a, device=device) + 0.1,
            routing(str(p["routing"]), t, e, a, turn, device), *pairs[turn // TURNS], m.activation, fmt,
        )
        for turn in range(TURNS * len(pairs))
    ]  # fmt: skip
    hit = len(inputs[0].rows.hit) * 3 * d * f
    return Case(
        inputs=inputs,
        expected=exact,
        renew=made.flip,
        operations=2 * t * a * 3 * d * f,
        bytes=hit * each + (row_bytes + 2) * t * d,
        arithmetic=row_format,
        tolerance=BF16_ERROR if row_format == "bf16" else EIGHT_BIT_ERROR,
        weights=hit,
        weight_bytes=each,
        stored=stored,
    )


def with_silu(inputs: Layer) -> Layer:
    return replace(inputs, activation="silu")


def composed(run: Callable[[Tensor, Any, Rows], Tensor], layer: Layer, w13: Any, w2: Any) -> Tensor:
    """The layer in fp32, of two grouped products: `run` takes grouped rows (M, K) and either matrix."""
    gate, up = run(layer.x_TD[layer.tokens], w13, layer.rows).chunk(2, dim=-1)
    out = run(ACTIVATIONS[layer.activation](gate) * up, w2, layer.rows)
    y_TD = torch.zeros(layer.x_TD.shape, device=layer.x_TD.device)
    return y_TD.index_add_(0, layer.tokens, out.float() * layer.weights[:, None])


def exact(layer: Layer) -> Tensor:
    return composed(product, layer, layer.w13, layer.w2)
