"""Dense projections."""

from __future__ import annotations

import torch
from torch import Tensor

import grok_kernels

from .weight import Weight


class Linear(Weight):
    """y_TN = x_TK · weightᵀ; no bias."""

    def __init__(self, k: int, parts: dict[str, int]) -> None:
        super().__init__(1, k, parts)

    def forward(self, x_TK: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        weight, scale = self.held()
        return grok_kernels.grouped_gemm(x_TK, weight, scale, out_dtype=out_dtype)
