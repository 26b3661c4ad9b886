"""Products of rows grouped by expert with the experts' matrices: one tile loop for every product of this package.

The grid is persistent. Its work list, the tiles of the rows that each expert really has, is computed from the
offsets on the device, so that nothing waits for the host and a graph may replay with other rows. Both operands are
K-major. The partial sum of each block of K leaves the tensor core wherever a scale changes, and always in e4m3 and
int8; the order of the additions depends on K alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..checks import GROUP
from ..chips import Chip, chip_of
from ..dtypes import FLOATS
from ..tuning import Gemm, gemm
from ..weights import Weight
from .launch import jit, launch
from .quantize import as_known

# The type in which the tensor cores multiply. All 8-bit values are exact in bf16.
_DOTS = {"e4m3": tl.float8e4nv, "int8": tl.int8, "bf16": tl.bfloat16, "fp32": tl.float32}


@triton.jit
def as_type(v, DOT: tl.constexpr):
    """v in the type of the product. uint8 holds e4m3 on chips whose compiler lacks that type; a NaN stays one."""
    if v.dtype == tl.uint8:
        bits = v.to(tl.uint32)
        value = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
        v = tl.where(
            (bits & 0x7F) == 0x7F, float("nan"), value
        )  # the factor above is 2**120, the difference of the exponent biases
    return v.to(DOT)


@triton.jit
def find_tile(
    tile, offsets_ptr, m, E: tl.constexpr, tiles_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr, EXPERTS: tl.constexpr
):
    """For a tile: its expert, first row and column tile, the end of the expert's rows, and the number of all tiles.

    GROUP_M tiles of rows take turns at one panel of weights before the next, so that both stay in L2.
    """
    if offsets_ptr is None:
        expert = tl.zeros((), tl.int32)
        first, lo, hi = expert, expert, m
        total = tl.cdiv(m, BLOCK_M) * tiles_n
    else:
        e = tl.arange(0, EXPERTS)
        starts = tl.load(offsets_ptr + e, mask=e < E, other=0)
        ends = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
        tiles = tl.cdiv(ends - starts, BLOCK_M) * tiles_n
        total = tl.sum(tiles)
        last = tl.cumsum(tiles)
        expert = tl.minimum(tl.sum((last <= tile).to(tl.int32)), E - 1)
        first = tl.sum(tl.where(e < expert, tiles, 0))
        lo = tl.load(offsets_ptr + expert)
        hi = tl.load(offsets_ptr + expert + 1)
    tile -= first
    tiles_m = tl.cdiv(hi - lo, BLOCK_M)
    top = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.maximum(tl.minimum(tiles_m - top, GROUP_M), 1)
    tile = tile % (GROUP_M * tiles_n)
    return expert, lo + (top + tile % height) * BLOCK_M, tile // height, hi, total


@triton.jit
def _weights(w, row, k, end, rows_left, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr):
    """A block (BLOCK_N, BLOCK_K) of the stacked matrices of all experts. Past the expert's rows it is 0, or with TMA
    the next expert's rows, which are not stored."""
    if TMA:
        block = w.load([row, k])
    else:
        n = tl.arange(0, BLOCK_N)
        at = k + tl.arange(0, BLOCK_K)
        pointers = w + (row.to(tl.int64) + n[:, None]) * stride + at[None, :]
        block = tl.load(pointers, mask=(n[:, None] < rows_left) & (at[None, :] < end), other=0.0)
    return block


@triton.jit
def _scaled(partial, x_scale, w_scale, SWAP: tl.constexpr):
    partial = partial.to(tl.float32)
    if w_scale is not None:
        partial *= w_scale[:, None] if SWAP else w_scale[None, :]
    if x_scale is not None:
        partial *= x_scale[None, :] if SWAP else x_scale[:, None]
    return partial


@triton.jit
def _multiply(acc, x, w, DOT: tl.constexpr, SWAP: tl.constexpr, FRESH: tl.constexpr):
    """acc + x wᵀ, or x wᵀ alone where FRESH; transposed where SWAP, the variant with swapped operands."""
    w = as_type(w, DOT)
    if SWAP:
        a, b = w, tl.trans(x)
    else:
        a, b = x, tl.trans(w)
    if FRESH:
        product = tl.dot(a, b, input_precision="ieee", out_dtype=tl.int32 if tl.int8 == DOT else tl.float32)
    else:
        product = tl.dot(a, b, acc, input_precision="ieee")
    return product


@triton.jit
def tile_product(
    x_ptr, x_stride, xs_ptr, xs_stride, rows, inside,
    w, w_stride, ws_ptr, ws_stride_e, ws_stride_g, expert, column, n, k, span,
    DOT: tl.constexpr, XS_GROUPS: tl.constexpr, WS_GROUPS: tl.constexpr, PAIR: tl.constexpr, TMA: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 (BLOCK_M, BLOCK_N) of x[rows] · w[expert, column..]ᵀ with all scales applied. With PAIR also the same for
    the columns n further on, where n is the width of one product, half of the matrix's rows.

    rows (BLOCK_M,) int64; rows not `inside` count as zeros. XS_GROUPS: x has a scale per 128 columns, else one a row.
    WS_GROUPS: the weights have a scale per `span` of K, a multiple of BLOCK_K; any span where x has no groups.
    """
    matrix = expert * (2 * n if PAIR else n) + column
    FRESH: tl.constexpr = WS_GROUPS or tl.float8e4nv == DOT or tl.int8 == DOT or (XS_GROUPS and xs_ptr is not None)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    acc2 = acc
    at_n = column + tl.arange(0, BLOCK_N)
    row_scale = None
    if xs_ptr is not None and not XS_GROUPS:
        row_scale = tl.load(xs_ptr + rows * xs_stride, mask=inside, other=0.0)
    blocks = tl.cdiv(span, BLOCK_K)
    for i in range(k // tl.maximum(span, 1) * blocks):
        group = i // blocks
        start = group * span + i % blocks * BLOCK_K
        end = (group + 1) * span
        at = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride + at[None, :], mask=inside[:, None] & (at[None, :] < end), other=0.0
        )
        x = as_type(x, DOT)
        # scales are loaded ahead of the product, to hide their latency
        x_scale = row_scale
        if FRESH and XS_GROUPS and xs_ptr is not None:
            x_scale = tl.load(xs_ptr + rows * xs_stride + start // 128, mask=inside, other=0.0)
        w_scale = None
        if WS_GROUPS:
            w_scales = ws_ptr + expert.to(tl.int64) * ws_stride_e + group * ws_stride_g + at_n
            w_scale = tl.load(w_scales, mask=at_n < n, other=0.0)
        part = _multiply(
            acc, x, _weights(w, matrix, start, end, n - column, w_stride, BLOCK_N, BLOCK_K, TMA), DOT, SWAP, FRESH
        )
        acc = acc + _scaled(part, x_scale, w_scale, SWAP) if FRESH else part
        if PAIR:
            if WS_GROUPS:
                w_scale = tl.load(w_scales + n, mask=at_n < n, other=0.0)
            part = _multiply(
                acc2, x, _weights(w, matrix + n, start, end, n - column, w_stride, BLOCK_N, BLOCK_K, TMA),
                DOT, SWAP, FRESH,
            )  # fmt: skip
            acc2 = acc2 + _scaled(part, x_scale, w_scale, SWAP) if FRESH else part
    w_scale = None
    w_scale2 = None
    if ws_ptr is not None and not WS_GROUPS:
        w_scales = ws_ptr + expert.to(tl.int64) * ws_stride_e + at_n
        w_scale = tl.load(w_scales, mask=at_n < n, other=0.0)
        if PAIR:
            w_scale2 = tl.load(w_scales + n, mask=at_n < n, other=0.0)
    last_scale = None if FRESH else row_scale
    acc = _scaled(acc, last_scale, w_scale, SWAP)
    if PAIR:
        acc2 = _scaled(acc2, last_scale, w_scale2, SWAP)
    if SWAP:
        acc = tl.trans(acc)
        acc2 = tl.trans(acc2)
    return acc, acc2


@jit(batch=("m",), unaligned=("offsets_ptr", "order_ptr", "topk_ptr"))
def _grouped_gemm(
    y_ptr, y_stride, offsets_ptr, order_ptr, topk_ptr, m,
    x_ptr, x_stride, xs_ptr, xs_stride, w, w_stride, ws_ptr, ws_stride_e, ws_stride_g, n, k, span,
    E: tl.constexpr, EXPERTS: tl.constexpr,
    DOT: tl.constexpr, XS_GROUPS: tl.constexpr, WS_GROUPS: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """y = x wᵀ by groups; with an order, row i times topk[order[i]] goes to row order[i] of y."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    expert, row, column, hi, total = find_tile(0, offsets_ptr, m, E, tiles_n, BLOCK_M, GROUP_M, EXPERTS)
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        expert, row, column, hi, total = find_tile(tile, offsets_ptr, m, E, tiles_n, BLOCK_M, GROUP_M, EXPERTS)
        column *= BLOCK_N
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        inside = rows < hi
        acc, _unused = tile_product(
            x_ptr, x_stride, xs_ptr, xs_stride, rows, inside,
            w, w_stride, ws_ptr, ws_stride_e, ws_stride_g, expert, column, n, k, span,
            DOT, XS_GROUPS, WS_GROUPS, False, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if order_ptr is not None:
            rows = tl.load(order_ptr + rows, mask=inside, other=0).to(tl.int64)
            acc *= tl.load(topk_ptr + rows, mask=inside, other=0.0)[:, None]
        at_n = column + tl.arange(0, BLOCK_N)
        tl.store(
            y_ptr + rows[:, None] * y_stride + at_n[None, :],
            acc.to(y_ptr.dtype.element_ty),
            mask=inside[:, None] & (at_n[None, :] < n),
        )


@dataclass(frozen=True)
class Operands:
    """A kernel's arguments for one product (from x_ptr to span), its compile-time values, and its grid."""

    args: tuple[Any, ...]
    meta: dict[str, Any]
    tile: Gemm
    chip: Chip

    def grid(self, rows: int, experts: int, n: int) -> tuple[int]:
        """One program a multiprocessor, or fewer where there cannot be as many tiles."""
        most = (triton.cdiv(rows, self.tile.block_m) + experts - 1) * triton.cdiv(n, self.tile.block_n)
        return (min(self.chip.multiprocessors, most),)


def dot_of(x: torch.dtype, w: torch.dtype, chip: Chip) -> str:
    """The type in which values of x and w multiply without loss on this chip."""
    if torch.float32 in (x, w):
        return "fp32"
    if x == w == torch.float8_e4m3fn and chip.has_fp8:
        return "e4m3"
    return "int8" if x == w == torch.int8 else "bf16"


def operands(x_MK: Tensor, x_scale: Tensor | None, weight: Weight, rows: int, *, pair: bool = False) -> Operands:
    """The arguments of a product of `rows` rows, some of which may be the same row of x; the weight in rows."""
    w_ENK, w_scale = weight.values, weight.scales
    experts, n, k = weight.shape
    chip = chip_of(x_MK.device)
    span = k if w_scale is None else k // w_scale.shape[1]
    if x_scale is not None and x_scale.shape[1] > 1 and span < k and span % GROUP:
        # the two kinds of groups overlap in part: rare, so x is dequantised first
        x_MK, x_scale = x_MK.float() * x_scale.repeat_interleave(GROUP, 1)[:, :k], None
    dot = dot_of(x_MK.dtype, w_ENK.dtype, chip)
    tile = gemm(n // 2 if pair else n, k, dot, w_ENK.dtype, chip, rows, pair=pair)
    x_MK, w_ENK = as_known(x_MK), as_known(w_ENK)
    if not w_ENK.is_contiguous() and w_ENK.stride(0) != n * w_ENK.stride(1):
        w_ENK = w_ENK.contiguous()
    tma = chip.has_tma and w_ENK.is_contiguous() and k * w_ENK.itemsize % 16 == 0 and (span == k or not span % 128)
    tma = tma and w_ENK.data_ptr() % 16 == 0 and k > 0
    w: Any = w_ENK
    if tma:
        w = TensorDescriptor(w_ENK, [experts * n, k], [k, 1], [tile.block_n, tile.block_k])
    args = (
        x_MK, x_MK.stride(0), x_scale, 0 if x_scale is None else x_scale.stride(0), w, w_ENK.stride(1),
        w_scale, *((0, 0) if w_scale is None else w_scale.stride()[:2]), n // 2 if pair else n, k, span,
    )  # fmt: skip
    meta = {
        "E": experts, "EXPERTS": triton.next_power_of_2(experts), "DOT": _DOTS[dot],
        "XS_GROUPS": x_scale is not None and x_scale.shape[1] > 1, "WS_GROUPS": span < k, "TMA": tma,
        "SWAP": tile.swap, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m, "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    return Operands(args, meta, tile, chip)


def product_into(
    y: Tensor, x: Tensor, x_scale: Tensor | None, weight: Weight,
    offsets: Tensor | None, order: Tensor | None = None, topk: Tensor | None = None,
) -> None:  # fmt: skip
    """y = x · weightᵀ by groups; with an order, row i times topk[order[i]] goes to row order[i] of y."""
    o = operands(x, x_scale, weight, x.shape[0])
    grid = o.grid(x.shape[0], weight.shape[0], weight.shape[1])
    launch(_grouped_gemm, grid, y, y.stride(0), offsets, order, topk, x.shape[0], *o.args, **o.meta)


def grouped_gemm(
    x_MK: Tensor,
    weight: Weight,
    offsets: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    weight = weight.with_layout("rows")
    default = x_MK.dtype if x_MK.dtype in FLOATS else torch.bfloat16
    y_MN = x_MK.new_empty((x_MK.shape[0], weight.shape[1]), dtype=out_dtype or default)
    if y_MN.numel():
        product_into(y_MN, x_MK, x_scale, weight, offsets)
    return y_MN
