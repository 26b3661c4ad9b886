"""Products of grouped rows with the experts' matrices."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..packing import unpack_weight
from ..registry import register
from .invariant import matmul_t
from .quantize import dequantize_rows, dequantize_weight


@register("grouped_gemm", "reference")
def grouped_gemm(
    x_MK: Tensor,
    weight_ENK: Tensor,
    weight_scale: Tensor | None,
    offsets: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    weight_ENK = unpack_weight(weight_ENK)
    if out_dtype is None:
        out_dtype = x_MK.dtype if x_MK.dtype in (torch.float32, torch.bfloat16) else torch.bfloat16
    x = dequantize_rows(x_MK, x_scale)
    bounds = [0, x.shape[0]] if offsets is None else offsets.tolist()
    parts = [
        matmul_t(x[lo:hi], dequantize_weight(weight_ENK[e], None if weight_scale is None else weight_scale[e]))
        for e, (lo, hi) in enumerate(pairwise(bounds))
        if hi > lo
    ]
    return torch.cat(parts).to(out_dtype) if parts else x.new_empty((0, weight_ENK.shape[1]), dtype=out_dtype)
