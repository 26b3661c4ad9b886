"""Arithmetic that several kernels share."""

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
