"""Token embedding, whose weight may serve the output too."""

from __future__ import annotations

import torch
from torch import Tensor

import grok_kernels
from grok_kernels.formats import FORMATS

from .weight import FusedWeight


class Embedding(FusedWeight):
    """weight_VD, looked up by token and, where tied, the matrix of the output head."""

    def __init__(self, name: str, vocab: int, d: int, *, tied: bool) -> None:
        super().__init__(1, d, {name: vocab})
        self.tied = tied

    def layout_for(
        self, spec: grok_kernels.Spec, device: torch.device | str, packed: bool | None = None
    ) -> grok_kernels.Layout:
        """Panels for products, and for values of fewer than 8 bits, which take less memory there."""
        useful = self.tied or FORMATS[spec.format].in_bit_planes
        return super().layout_for(spec, device, packed) if useful else "rows"

    def forward(self, tokens_T: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
        """weight[token] · multiplier, in fp32, rounded once to `dtype`."""
        return grok_kernels.weight_rows(self.weight, tokens_T, multiplier, dtype)
