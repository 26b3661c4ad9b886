"""RMS norms: one program a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


@triton.jit
def _rms_norm(x_ptr, weight_ptr, y_ptr, d, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    x = tl.load(x_ptr + row * d + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    y = weight * x * tl.rsqrt(tl.sum(x * x) / d + eps)
    tl.store(y_ptr + row * d + column, y.to(y_ptr.dtype.element_ty), mask=inside)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    y_TD = x_TD.new_empty(x_TD.shape)
    t, d = x_TD.shape
    launch(_rms_norm, (t,), x_TD, weight_D, y_TD, d, eps, BLOCK=triton.next_power_of_2(d), num_warps=8)
    return y_TD
