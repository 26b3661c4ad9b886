"""RMS norms: one program a row, which it reads once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import GROUP
from .launch import launch
from .quantize import as_known, quantized


@triton.jit
def _rms(x, weight_ptr, column, inside, d, eps):
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return weight * x * tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x) / d + eps))


@triton.jit
def _rms_norm(x_ptr, weight_ptr, y_ptr, d, stride, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    y = _rms(x, weight_ptr, column, inside, d, eps)
    tl.store(y_ptr + row * d + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sandwich_norm(
    h_ptr, delta_ptr, post_ptr, pre_ptr, sum_ptr, y_ptr, q_ptr, scale_ptr, d, groups, h_stride, delta_stride, eps,
    HAS_POST: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """With q_ptr, y also in e4m3, with a scale per GROUP columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    dtype = y_ptr.dtype.element_ty
    added = tl.load(delta_ptr + row * delta_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_POST:
        added = _rms(added, post_ptr, column, inside, d, eps).to(dtype).to(tl.float32)
    h = tl.load(h_ptr + row * h_stride + column, mask=inside, other=0.0).to(tl.float32)
    h = (h + added).to(dtype)
    tl.store(sum_ptr + row * d + column, h, mask=inside)
    y = _rms(h.to(tl.float32), pre_ptr, column, inside, d, eps).to(dtype)
    tl.store(y_ptr + row * d + column, y, mask=inside)
    if q_ptr is not None:
        q, scale = quantized(tl.reshape(y.to(tl.float32), (BLOCK // GROUP, GROUP)), 448.0, q_ptr.dtype.element_ty)
        tl.store(q_ptr + row * d + column, tl.reshape(q, (BLOCK,)), mask=inside)
        group = tl.arange(0, BLOCK // GROUP)
        tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)


def _warps(block: int) -> int:
    """Warps for 16 values a thread, within the limits of a block."""
    return min(max(block // 512, 1), 16)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    y_TD = x_TD.new_empty(x_TD.shape)
    t, d = x_TD.shape
    block = triton.next_power_of_2(max(d, 1))
    launch(
        _rms_norm, (t,), x_TD, weight_D, y_TD, d, x_TD.stride(0), eps, BLOCK=block, num_warps=_warps(block)
    )  # fmt: skip
    return y_TD


def sandwich_norm(
    h_TD: Tensor, delta_TD: Tensor, post_D: Tensor | None, pre_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _launch_sandwich(h_TD, delta_TD, post_D, pre_D, eps, None, None)


def sandwich_norm_fp8(
    h_TD: Tensor, delta_TD: Tensor, post_D: Tensor | None, pre_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, d = h_TD.shape
    q_TD = h_TD.new_empty((t, d), dtype=torch.float8_e4m3fn)
    scale = h_TD.new_empty((t, triton.cdiv(d, GROUP)), dtype=torch.float32)
    return *_launch_sandwich(h_TD, delta_TD, post_D, pre_D, eps, as_known(q_TD), scale), q_TD, scale


def _launch_sandwich(
    h_TD: Tensor, delta_TD: Tensor, post_D: Tensor | None, pre_D: Tensor, eps: float,
    q_TD: Tensor | None, scale: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sum_TD, y_TD = h_TD.new_empty(h_TD.shape), h_TD.new_empty(h_TD.shape)
    t, d = h_TD.shape
    block = triton.next_power_of_2(max(d, 1 if q_TD is None else GROUP))
    launch(
        _sandwich_norm, (t,), h_TD, delta_TD, pre_D if post_D is None else post_D, pre_D, sum_TD, y_TD, q_TD, scale, d,
        triton.cdiv(d, GROUP), h_TD.stride(0), delta_TD.stride(0), eps, HAS_POST=post_D is not None, BLOCK=block,
        GROUP=GROUP, num_warps=_warps(block),
    )  # fmt: skip
    return sum_TD, y_TD
