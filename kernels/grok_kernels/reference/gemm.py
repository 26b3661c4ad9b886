"""Products of grouped rows with the experts' matrices."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..dtypes import FLOATS
from ..registry import register
from ..weights import Weight
from .invariant import matmul_t
from .quantize import dequantize_rows, dequantize_weight


@register("grouped_gemm", "reference")
def grouped_gemm(
    x_MK: Tensor,
    weight: Weight,
    offsets: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    if out_dtype is None:
        out_dtype = x_MK.dtype if x_MK.dtype in FLOATS else torch.bfloat16
    x = dequantize_rows(x_MK, x_scale)
    bounds = [0, x.shape[0]] if offsets is None else offsets.tolist()
    weight = weight.with_layout("rows")
    parts = [matmul_t(x[lo:hi], dequantize_weight(weight, e)) for e, (lo, hi) in enumerate(pairwise(bounds)) if hi > lo]
    return torch.cat(parts).to(out_dtype) if parts else x.new_empty((0, weight.shape[1]), dtype=out_dtype)
