"""The expert layer in three launches: gate and up with the activation and its quantisation, down with each row's
routing weight, and the sum over a token's experts in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import GROUP
from ..experts import ExpertLayer
from .arithmetic import tanh
from .gemm import find_tile, operands, product_into, tile_product
from .launch import jit, launch
from .quantize import LARGEST, as_known, quantize_fp8, quantize_int8, quantized
from .route import group_tokens

_QUANTIZED = {"fp8": (quantize_fp8, torch.float8_e4m3fn), "int8": (quantize_int8, torch.int8)}


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))
    return y


@jit(batch=("m",), unaligned=("offsets_ptr", "order_ptr"))
def _gate_up(
    y_ptr, y_stride, ys_ptr, ys_stride, offsets_ptr, order_ptr, m, active, largest,
    x_ptr, x_stride, xs_ptr, xs_stride, w, w_stride, ws_ptr, ws_stride_e, ws_stride_g, n, k, span,
    ACTIVATION: tl.constexpr, E: tl.constexpr, EXPERTS: tl.constexpr,
    DOT: tl.constexpr, XS_GROUPS: tl.constexpr, WS_GROUPS: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y[i] = act(gate) * up of token order[i] // active; with ys_ptr, quantised per BLOCK_N columns."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    expert, row, panel, hi, total = find_tile(0, offsets_ptr, m, E, tiles_n, BLOCK_M, GROUP_M, EXPERTS)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, panel, hi, total = find_tile(tile, offsets_ptr, m, E, tiles_n, BLOCK_M, GROUP_M, EXPERTS)
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        inside = rows < hi
        tokens = tl.load(order_ptr + rows, mask=inside, other=0).to(tl.int64) // active
        gate, up = tile_product(
            x_ptr, x_stride, xs_ptr, xs_stride, tokens, inside,
            w, w_stride, ws_ptr, ws_stride_e, ws_stride_g, expert, panel * BLOCK_N, n, k, span,
            DOT, XS_GROUPS, WS_GROUPS, True, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y = _activate(gate, ACTIVATION) * up
        at_n = panel * BLOCK_N + tl.arange(0, BLOCK_N)
        in_y = inside[:, None] & (at_n[None, :] < n)
        if ys_ptr is not None:
            y, scale = quantized(tl.where(in_y, y, 0.0), largest, y_ptr.dtype.element_ty)
            tl.store(ys_ptr + rows * ys_stride + panel, scale, mask=inside)
        else:
            y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + rows[:, None] * y_stride + at_n[None, :], y, mask=in_y)


@triton.jit
def _combine(parts_ptr, y_ptr, d, ACTIVE: tl.constexpr, BLOCK: tl.constexpr):
    """y_TD = the sum over a of parts_TAD, first to last."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in range(ACTIVE):
        total += tl.load(parts_ptr + (token * ACTIVE + a) * d + at, mask=at < d, other=0.0)
    tl.store(y_ptr + token * d + at, total.to(y_ptr.dtype.element_ty), mask=at < d)


def moe(x_TD: Tensor, *args: Any) -> Tensor:
    layer, x_scale, dtype = ExpertLayer(*args), None, x_TD.dtype
    if layer.act_format != "none" and x_TD.numel():
        x_TD, x_scale = _QUANTIZED[layer.act_format][0](x_TD, GROUP)
    return _layer(x_TD, x_scale, layer, dtype)


def moe_fp8(x_TD: Tensor, x_scale: Tensor, *args: Any) -> Tensor:
    return _layer(x_TD, x_scale, *ExpertLayer.of_fp8(*args))


def _layer(x_TD: Tensor, x_scale: Tensor | None, layer: ExpertLayer, dtype: torch.dtype) -> Tensor:
    """The layer on rows that are already in the activations' format; the result in `dtype`."""
    w13, w2 = layer.w13.with_layout("rows"), layer.w2.with_layout("rows")
    order, offsets = layer.order, layer.offsets
    (t, d), active = x_TD.shape, layer.experts.shape[1]
    experts, _, f = w2.shape
    y_TD = x_TD.new_empty((t, d), dtype=dtype)
    if not y_TD.numel():
        return y_TD
    if not active:
        return y_TD.zero_()
    if order is None or offsets is None:
        order, offsets = group_tokens(layer.experts, experts)
    inner, inner_scale = y_TD.new_empty((t * active, f)), None
    quantized_to = {} if layer.act_format == "none" else {"BLOCK_N": GROUP}
    if quantized_to:
        inner = inner.new_empty(inner.shape, dtype=_QUANTIZED[layer.act_format][1])
        inner_scale = y_TD.new_empty((t * active, triton.cdiv(f, GROUP)), dtype=torch.float32)
    o = operands(x_TD, x_scale, w13, t * active, pair=True)
    launch(
        _gate_up, o.grid(t * active, experts, f), as_known(inner), f, inner_scale, triton.cdiv(f, GROUP),
        offsets, order, t * active, active, LARGEST.get(inner.dtype, 0.0), *o.args,
        ACTIVATION=layer.activation, **o.meta | quantized_to,
    )  # fmt: skip
    parts = y_TD.new_empty((t * active, d), dtype=torch.float32)
    product_into(parts, inner, inner_scale, w2, offsets, order, layer.topk_weights.contiguous())
    launch(_combine, (t, triton.cdiv(d, 1024)), parts, y_TD, d, ACTIVE=active, BLOCK=1024, num_warps=4)
    return y_TD
