"""Products of rows with the matrices of their experts, and the expert layer made of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import EIGHT_BIT, FP32, GROUP, INT, Checker
from ..dtypes import FLOATS, dtype_name
from ..experts import ExpertLayer
from ..formats import FORMATS
from ..weights import Weight
from .define import op, result

ACTIVATIONS = ("gelu_tanh", "gelu", "silu")
ACT_FORMATS = ("none", "fp8", "int8")


@op()
def grouped_gemm(
    x: Tensor,
    weight: Weight,
    offsets: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[rows of e] = x[rows of e] @ weight[e]ᵀ, accumulated in fp32, with the scales of both applied exactly.

    x (M, K) fp32 or bf16, or int8 or e4m3 with x_scale (M, 1) or (M, ⌈K/128⌉) fp32. weight (E, N, K) in any format and
    layout: the layout changes the speed, never the result. offsets (E+1,) int32: rows offsets[e]..offsets[e+1] belong
    to expert e, and the last offset is M (the cpu backend refuses others); None only for E = 1, the dense projection.
    Returns (M, N) of out_dtype, fp32 or bf16: by default x's dtype, or bf16 for a quantised x.
    """
    c = Checker("grouped_gemm")
    c.tensor("x", x, "M K", FLOATS + EIGHT_BIT)
    _check_weight(c, "weight", weight, "E N K")
    if offsets is not None:
        _check_offsets(c, offsets)
    elif c.size("E") != 1:
        c.fail(f"offsets is None, expected (E + 1,) with E={c.size('E')}")
    if x.dtype in EIGHT_BIT:
        if x_scale is None:
            raise c.error(f"x_scale is None, expected scales (M, groups) for x of {dtype_name(x.dtype)}")
        c.tensor("x_scale", x_scale, "M groups", FP32)
        if c.size("groups") not in (1, -(-x.shape[1] // GROUP)):
            c.fail(f"x_scale has {c.size('groups')} groups, expected 1 or {-(-x.shape[1] // GROUP)} of {GROUP} columns")
    elif x_scale is not None:
        c.fail(f"x_scale is given, expected None for x of {dtype_name(x.dtype)}")
    if out_dtype is not None and out_dtype not in FLOATS:
        c.fail(f"out_dtype={out_dtype}, expected torch.float32 or torch.bfloat16")
    default = torch.bfloat16 if x.dtype in EIGHT_BIT else x.dtype
    return result((x.shape[0], c.size("N")), out_dtype or default)


@op()
def moe(
    x: Tensor,
    topk_weights: Tensor,
    experts: Tensor,
    w13: Weight,
    w2: Weight,
    activation: str = "gelu_tanh",
    act_format: str = "none",
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """y_T = Σ_a topk_weights[t, a] · w2[e] · (act(w1[e] · x_t) * (w3[e] · x_t)), e = experts[t, a]: the expert layer.

    Products accumulate in fp32, scales applied exactly; activation, product and the weighted sum in fp32. act * up,
    the input of the second product, rounds to x's dtype, and so does y. w13 stacks the gate w1 (rows 0..F−1) and the up
    projection w3 (rows F..2F−1). activation is gelu_tanh, gelu (erf) or silu. act_format "fp8" or "int8" quantises x,
    and act * up, per token and group of 128 first.

    x (T, D) fp32 or bf16; topk_weights (T, A) fp32; experts (T, A) int32, in 0..E−1 (the cpu backend refuses others);
    w13 (E, 2F, D) and w2 (E, D, F), each in any format (a GPU's backends take one for both). Returns (T, D) of x's
    dtype.

    order (T·A,) and offsets (E+1,) int32, both or neither: what `group_tokens` gives for these experts, or
    `route_and_group` in the router's pass, so that the backend need not group rows again; no bit changes.
    """
    c = Checker("moe")
    c.tensor("x", x, "T D", FLOATS)
    _check_layer(c, ExpertLayer(topk_weights, experts, w13, w2, activation, act_format, order, offsets))
    c.one_of("act_format", act_format, ACT_FORMATS)
    return result(x.shape, x.dtype)


@op()
def moe_fp8(
    x: Tensor,
    x_scale: Tensor,
    topk_weights: Tensor,
    experts: Tensor,
    w13: Weight,
    w2: Weight,
    activation: str = "gelu_tanh",
    out_dtype: torch.dtype = torch.bfloat16,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """`moe` with act_format "fp8" on rows that are quantised already, as by `sandwich_norm_fp8` or `quantize_fp8`.

    x (T, D) float8_e4m3fn and x_scale (T, ⌈D/128⌉) fp32; all else as in `moe`. Returns (T, D) of out_dtype, fp32 or
    bf16: bit for bit what the backend's `moe` returns for the rows, of that type, that x was quantised from.
    """
    c = Checker("moe_fp8")
    c.tensor("x", x, "T D", (torch.float8_e4m3fn,))
    c.tensor("x_scale", x_scale, "T groups", FP32)
    if c.size("groups") != -(-x.shape[1] // GROUP):
        c.fail(f"x_scale has {c.size('groups')} groups, expected {-(-x.shape[1] // GROUP)} of {GROUP} columns")
    _check_layer(c, ExpertLayer(topk_weights, experts, w13, w2, activation, "fp8", order, offsets))
    if out_dtype not in FLOATS:
        c.fail(f"out_dtype={out_dtype}, expected torch.float32 or torch.bfloat16")
    return result(x.shape, out_dtype)


def _check_layer(c: Checker, layer: ExpertLayer) -> None:
    w13, w2, order, offsets = layer.w13, layer.w2, layer.order, layer.offsets
    c.tensor("topk_weights", layer.topk_weights, "T A", FP32)
    c.tensor("experts", layer.experts, "T A", INT)
    _check_weight(c, "w2", w2, "E D F")
    _check_weight(c, "w13", w13, "E 2F D")
    if c.size("2F") != 2 * c.size("F"):
        c.fail(f"w13 has shape {w13.shape}, expected (E, 2F, D) with F={c.size('F')} from w2")
    c.one_of("activation", layer.activation, ACTIVATIONS)
    if order is None and offsets is None:
        return
    if order is None or offsets is None:
        missing, given = ("order", "offsets") if order is None else ("offsets", "order")
        raise c.error(f"{missing} is None, expected both or neither, and {given} is given")
    c.tensor("order", order, "TA", INT)
    if c.size("TA") != c.size("T") * c.size("A"):
        c.fail(f"order has shape {tuple(order.shape)}, expected (T·A,) with T={c.size('T')} and A={c.size('A')}")
    _check_offsets(c, offsets)


def _check_weight(c: Checker, name: str, weight: Weight, dims: str) -> None:
    """Its logical sizes, its device, and that its planes are those of a weight of its format, layout and shape: the
    constructor does not check, and kernels compute addresses from the shape."""
    c.sizes(name, weight.shape, dims.split())
    if weight.format in FORMATS:  # a backend refuses others by name
        if len(weight.planes) != len(FORMATS[weight.format].planes):
            c.fail(f"{name} has {len(weight.planes)} planes, expected {', '.join(FORMATS[weight.format].planes)}")
        try:
            fits = Weight.of(**weight.named_planes(), layout=weight.layout, format=weight.format)
        except ValueError as error:
            raise c.error(f"{name} of format {weight.format}: {error}") from None
        if fits.shape != weight.shape:
            c.fail(f"{name} of format {weight.format} has shape {weight.shape}, but that of its planes is {fits.shape}")
    for plane in weight.planes:
        c.same_device(name, plane)


def _check_offsets(c: Checker, offsets: Tensor) -> None:
    c.tensor("offsets", offsets, "E_plus_1", INT)
    if c.size("E_plus_1") != c.size("E") + 1:
        c.fail(f"offsets has shape {tuple(offsets.shape)}, expected (E + 1,) with E={c.size('E')}")
