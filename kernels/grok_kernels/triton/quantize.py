"""Activations to e4m3 or int8: one program a row and up to 16 groups of its columns. It reads x once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import quantize
from .launch import launch

GROUPS = 16  # a program


@triton.jit
def _quantize(
    x_ptr, q_ptr, scale_ptr, d, stride, groups, width,
    DTYPE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    within = tl.arange(0, WIDTH)
    column = group[:, None] * width + within[None, :]
    inside = (within < width)[None, :] & (column < d)
    x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    q, scale = quantize(x, DTYPE)
    tl.store(q_ptr + row * d + column, q, mask=inside)
    tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)


def _quantized(x_TD: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    t, d = x_TD.shape
    width = group_size or d
    groups = triton.cdiv(d, group_size) if group_size else 1
    q_TD = torch.empty((t, d), dtype=dtype, device=x_TD.device)
    scale_TN = torch.empty((t, groups), dtype=torch.float32, device=x_TD.device)
    block = min(GROUPS, triton.next_power_of_2(groups)) if groups else 1
    launch(
        _quantize, (t, triton.cdiv(groups, block)), x_TD, q_TD, scale_TN, d, x_TD.stride(0), groups, width,
        DTYPE=tl.int8 if dtype == torch.int8 else tl.float8e4nv, GROUPS=block,
        WIDTH=triton.next_power_of_2(max(width, 1)), num_warps=4,
    )  # fmt: skip
    return q_TD, scale_TN


def quantize_fp8(x_TD: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return _quantized(x_TD, group_size, torch.float8_e4m3fn)


def quantize_int8(x_TD: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    return _quantized(x_TD, group_size, torch.int8)
