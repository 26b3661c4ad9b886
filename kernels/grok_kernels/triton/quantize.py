"""Activations in 8 bits, one program for a token and up to 16 groups of its columns; and the parts for fused
epilogues."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chips import chip_of
from .launch import launch

GROUPS = 16  # of one program
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@triton.jit
def _code_of_e4m3(x):
    """The byte of the nearest e4m3, ties to even, for |x| up to 448, on chips whose compiler lacks the type."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960  # 120 << 3, the difference of the exponent biases
    small = ((tl.abs(x) + 16384.0) - 16384.0) * 512.0  # a sum in [2**14, 2**15) has steps of 2**-9
    code = tl.where(tl.abs(x) < 0.015625, small.to(tl.uint32), normal)
    return (tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantized(x, largest, DTYPE: tl.constexpr):
    """Rows of x (M, N) as e4m3, e4m3 bytes or int8, and each row's scale, amax / largest. A NaN makes its row NaN."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=1), 7.888609052210118e-31)  # 2**-100
    amax = tl.where(tl.max((x != x).to(tl.int32), axis=1) > 0, float("nan"), amax)  # max skips a NaN
    scale = tl.div_rn(amax, tl.zeros_like(amax) + largest)
    x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    x = tl.where(x > largest, largest, tl.where(x < -largest, -largest, x))
    if tl.int8 == DTYPE:
        whole = tl.floor(x)
        rest = x - whole  # exact; halves round to even
        up = (rest > 0.5) | ((rest == 0.5) & ((whole.to(tl.int32) & 1) == 1))
        q = (whole + tl.where(up, 1.0, 0.0)).to(tl.int8)
    elif tl.uint8 == DTYPE:
        q = _code_of_e4m3(x)
    else:
        q = x.to(DTYPE)
    return q, scale


@triton.jit
def _quantize(
    x_ptr, q_ptr, scale_ptr, d, stride, groups, width, largest, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, WIDTH)
    column = group[:, None] * width + within[None, :]
    inside = (within < width)[None, :] & (column < d)
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    q, scale = quantized(x, largest, q_ptr.dtype.element_ty)
    tl.store(q_ptr + row * d + column, q, mask=inside)
    tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)


def _quantized_as(x_TD: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    t, d = x_TD.shape
    width, groups = (group_size, triton.cdiv(d, group_size)) if group_size else (d, 1)
    q_TD = torch.empty((t, d), dtype=dtype, device=x_TD.device)
    scale_TN = torch.empty((t, groups), dtype=torch.float32, device=x_TD.device)
    block = triton.next_power_of_2(max(width, 1))
    together = min(GROUPS, triton.next_power_of_2(max(groups, 1)))
    launch(
        _quantize, (t, triton.cdiv(groups, together)), x_TD, as_known(q_TD), scale_TN, d, x_TD.stride(0), groups, width,
        LARGEST[dtype], GROUPS=together, WIDTH=block, num_warps=max(1, min(8, together * block // 512)),
    )  # fmt: skip
    return q_TD, scale_TN


def as_known(x: Tensor) -> Tensor:
    """x, viewed as bytes if it is e4m3 and its chip's compiler lacks the type."""
    if x.dtype == torch.float8_e4m3fn and not chip_of(x.device).has_fp8:
        return x.view(torch.uint8)
    return x


def quantize_fp8(x_TD: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return _quantized_as(x_TD, group_size, torch.float8_e4m3fn)


def quantize_int8(x_TD: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return _quantized_as(x_TD, group_size, torch.int8)
