"""Token embedding, whose weight may serve the output too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .weight import Table


class Embedding(Table):
    """weight_VD by token."""

    def forward(self, tokens_T: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
        """weight[token] · multiplier, in fp32, rounded once to `dtype`."""
        return (nn.functional.embedding(tokens_T, self.weight).float() * multiplier).to(dtype)
