"""Functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Within 3 units in the last place. Near 0, where 1 − e^−2a would cancel, the Taylor series to x^13."""
    a = tl.abs(x)
    s = x * x
    q = -1382.0 / 155925.0 + s * (21844.0 / 6081075.0)
    q = 2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0 + s * q))
    small = x + x * s * (-1.0 / 3.0 + s * q)
    e = tl.exp(-2.0 * a)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(a < 0.4, small, tl.where(x < 0.0, -large, large))


@triton.jit
def quantize(x, DTYPE: tl.constexpr):
    """x (rows, columns) fp32 in e4m3 or int8, one scale a row: `quantize_fp8` and `quantize_int8` of `ops`."""
    largest = 127.0 if DTYPE == tl.int8 else 448.0
    amax = tl.max(tl.abs(x), 1)
    nans = tl.max((x != x).to(tl.int32), 1)  # which a maximum drops
    amax = tl.where(nans > 0, float("nan"), tl.maximum(amax, 7.888609052210118e-31))  # 2**-100
    scale = tl.div_rn(amax, tl.full(amax.shape, largest, tl.float32))
    q = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    q = tl.where(q != q, q, tl.minimum(tl.maximum(q, -largest), largest))
    if DTYPE == tl.int8:
        q = (q + 12582912.0) - 12582912.0  # 1.5 · 2^23: to nearest, halves to even
    return q.to(DTYPE), scale
