"""grouped_gemm: the experts' products and the dense ones, in the formats of `problems`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import BF16_ERROR, EIGHT_BIT_ERROR, TURNS, Case, copies
from .data import BYTES, GROUPED, Rows, Weights, kept, routing, weight_bytes
from .ours import quantize
from .problems import ROUTINGS, TOKENS, Problem, family

# The weights' format, with rows in bf16; with rows quantised beforehand (x); with rows quantised within the time (dyn).
FORMATS = (
    *("bf16", "int8", "fp8", "int8xint8", "fp8xfp8", "int8dyn", "fp8dyn"),
    *GROUPED, *(f"{fmt}dyn" for fmt in GROUPED),
)  # fmt: skip


def parts(fmt: str) -> tuple[str, str]:
    """The formats of the weights and of the rows in a format's name: fp8 is (fp8, bf16), fp8dyn (fp8, fp8), and
    int4_kdyn (int4_k, int8)."""
    if fmt.endswith("dyn"):
        weight = fmt.removesuffix("dyn")
        return weight, weight if weight in BYTES else "int8"
    weight, _, rows = fmt.partition("x")
    return weight, rows or "bf16"


@dataclass(frozen=True)
class Product:
    """One call: rows (M, K) bf16 in the order of their experts, and the same quantised where the format wants that."""

    x_MK: Tensor
    weights: Weights
    rows: Rows
    fmt: str
    quantized: tuple[Tensor, Tensor] | None  # with scales for each row and group of 128

    @property
    def args(self) -> tuple[Any, ...]:
        x, x_scale = self.quantized or (self.x_MK, None)
        return x, self.weights, self.rows.offsets, x_scale, torch.bfloat16

    def flip(self) -> None:
        """As `case.flip`, the quantised rows, too."""
        self.x_MK.copy_(self.x_MK.flip(-1))
        if self.quantized:
            for old, new in zip(self.quantized, quantize(self.x_MK, parts(self.fmt)[1]), strict=True):
                old.copy_(new)

    @property
    def dynamic(self) -> str:
        """The format that rows are to be quantised to within the call; empty if they are not."""
        return parts(self.fmt)[1] if self.fmt.endswith("dyn") else ""


def size(p: Problem) -> tuple[int, int, int]:
    """(E, N, K) of the weights."""
    m = p.shape
    return {
        "w13": (m.num_experts, 2 * m.d_ff, m.d_model),
        "w2": (m.num_experts, m.d_model, m.d_ff),
        "qkv": (1, m.qkv_dim, m.d_model),
        "o": (1, m.d_model, m.num_heads * m.head_dim),
        "head": (1, m.vocab_size, m.d_model),
    }[str(p["matrix"])]


def footprint(p: Problem) -> float:
    e, n, k = size(p)
    rows = p.number("tokens") * (p.shape.num_experts_per_tok if e > 1 else 1)
    fmt = parts(str(p["format"]))[0]
    # the weights and our packed copy, and one matrix in fp32, three times
    return (
        e * n * k * (weight_bytes(fmt, k, in_rows=True) + weight_bytes(fmt, k))
        + 12 * n * k
        + TURNS * 3 * rows * k
        + 6 * rows * n
    )


@family(
    "grouped_gemm",
    "{matrix}-{format}-{routing}-t{tokens}",
    {"matrix": ("w13", "w2"), "format": FORMATS, "routing": ROUTINGS, "tokens": TOKENS},
    footprint=footprint,
)
@family(  # dense: E = 1
    "grouped_gemm", "{matrix}-{format}-t{tokens}",
    {"matrix": ("qkv", "o", "head"), "format": FORMATS, "tokens": TOKENS}, footprint=footprint,
)  # fmt: skip
def build(p: Problem, device: str, cold: int) -> Case:
    m, fmt, (e, n, k) = p.shape, str(p["format"]), size(p)
    weight_format, row_format = parts(fmt)
    key, each = (e, n, k, weight_format, device), weight_bytes(weight_format, k)
    several = copies(e * n * k * each, cold)
    weights = kept((p.op, *key, cold), lambda: [Weights.random(*key) for _ in range(several)])
    inputs = []
    for turn in range(TURNS * len(weights)):
        if e == 1:
            rows = Rows([0, p.number("tokens")], device)
        else:
            rows = Rows.of(routing(str(p["routing"]), p.number("tokens"), e, m.num_experts_per_tok, turn, device), e)
        x_MK = torch.randn(rows.total, k, device=device).bfloat16()
        inputs.append(
            Product(x_MK, weights[turn // TURNS], rows, fmt, quantize(x_MK, row_format) if "x" in fmt else None)
        )
    rows = inputs[0].rows
    hit = len(rows.hit) * n * k
    return Case(
        inputs=inputs,
        expected=exact,
        renew=Product.flip,
        operations=2 * rows.total * n * k,
        bytes=hit * each + rows.total * (k * (BYTES[row_format] if "x" in fmt else 2) + 2 * n),
        arithmetic=row_format,
        tolerance=BF16_ERROR if row_format == "bf16" else EIGHT_BIT_ERROR,
        weights=hit,
        weight_bytes=each,
        stored=e * n * k,
    )


def product(x_MK: Tensor, weights: Weights, rows: Rows) -> Tensor:
    """y (M, N) in fp32: each expert's rows by its matrix."""
    return torch.cat([x_MK[rows.part(e)].float() @ weights.float(e).t() for e in rows.hit])


def exact(inputs: Product) -> Tensor:
    """The product of the rows before they were quantised."""
    return product(inputs.x_MK, inputs.weights, inputs.rows)
