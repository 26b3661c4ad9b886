"""Floating point weights → int8 with bf16 scales, as the release stores them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from grok_engine.checkpoint.xai.pickles import Array

_BF16 = np.dtype(ml_dtypes.bfloat16)
_SMALLEST = float(np.finfo(np.float32).tiny)  # bf16 has the exponents of fp32; below this it loses precision


def quantize_matrix(w: Array, groups: int) -> tuple[Array, Array]:
    """`scale = bf16(amax / 127)` for each column and group of in/groups rows, `q = round(w / scale)` in ±127.

    w: (…, in, out), floating point. Returns int8 (…, in, out) and bf16 scales (…, groups, out). The weights are
    rounded against the rounded scale, so only one rounding separates `q * scale` from w. A column of zeros gets
    the scale 1; no scale is zero, denormal or infinite. Raises ValueError for NaN or infinity in w.
    """
    if w.ndim < 2 or w.size == 0:
        raise ValueError(f"a matrix (…, in, out) is expected, found shape {w.shape}")
    if w.dtype not in (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), _BF16):
        raise ValueError(f"floating point weights are expected, found {w.dtype.name}")
    rows, columns = w.shape[-2:]
    if groups < 1 or rows % groups:
        raise ValueError(f"groups={groups} does not divide {rows} input rows")
    q = np.empty(w.shape, np.int8)
    scales = np.empty((*w.shape[:-2], groups, columns), _BF16)
    size = rows // groups
    # One block at a time: the temporaries of a whole expert layer in fp32 would be several times its size.
    for lead in np.ndindex(*w.shape[:-2]):
        for g in range(groups):
            part = slice(g * size, (g + 1) * size)
            q[lead][part], scales[lead][g] = _quantize_block(w[lead][part])
    return q, scales


def _quantize_block(w: Array) -> tuple[Array, Array]:
    x = w.astype(np.float32)
    amax = np.abs(x).max(axis=0)
    if not np.isfinite(amax).all():
        raise ValueError(f"weights must be finite, found NaN or infinity in {int((~np.isfinite(amax)).sum())} columns")
    wanted = np.where(amax == 0, np.float32(1), np.maximum(amax / np.float32(127), np.float32(_SMALLEST)))
    scale = wanted.astype(_BF16)
    # A scale that was rounded down would put the largest weight just past 127.
    q = np.clip(np.rint(x / scale.astype(np.float32)), -127, 127).astype(np.int8)
    return q, scale
