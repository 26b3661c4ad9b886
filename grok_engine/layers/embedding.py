"""Token embedding, whose weight may serve the output too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import grok_kernels

from .weight import Table


class Embedding(Table):
    """weight_VD, by token or, as the tied output head, whole."""

    def forward(self, tokens_T: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
        """weight[token] · multiplier, in fp32, rounded once to `dtype`."""
        return (nn.functional.embedding(tokens_T, self.weight).float() * multiplier).to(dtype)

    def attend(self, x_TD: Tensor) -> Tensor:
        """x · weightᵀ, (T, V) fp32."""
        return grok_kernels.grouped_gemm(x_TD, self.weight[None], out_dtype=torch.float32)
