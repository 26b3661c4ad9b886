"""Token embedding, whose weight may serve the output too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import grok_kernels

from .weight import Table, holds_packed

ROWS = 4096  # converted at once, so that no second table is ever whole


class Embedding(Table):
    """weight_VD, by token or, as the tied output head, whole; as the head it may be held packed."""

    def __init__(self, name: str, vocab: int, d: int, *, tied: bool) -> None:
        super().__init__(name, vocab, d)
        self.vocab, self.d, self.tied = vocab, d, tied

    def form(self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None) -> tuple[int, ...]:
        if self.tied and holds_packed(self.vocab, self.d, dtype, device, packed):
            return grok_kernels.packed_shape(1, self.vocab, self.d, dtype)
        return self.shape

    def fill(self, source: Tensor) -> None:
        if not grok_kernels.is_packed(self.weight):
            super().fill(source)
            return
        for at in range(0, self.vocab, ROWS):
            grok_kernels.pack_into(source[None, at : at + ROWS].to(self.weight.dtype), self.weight, at)

    def values(self) -> Tensor:
        return grok_kernels.unpack_weight(self.weight)[0] if grok_kernels.is_packed(self.weight) else self.weight

    def forward(self, tokens_T: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
        """weight[token] · multiplier, in fp32, rounded once to `dtype`."""
        weight = self.held()
        if grok_kernels.is_packed(weight):
            rows_TD = grok_kernels.packed_rows(weight, tokens_T)
        else:
            rows_TD = nn.functional.embedding(tokens_T, weight)
        # one product does all that where the types agree: it is computed in fp32 and rounded once
        return rows_TD * multiplier if rows_TD.dtype == dtype else (rows_TD.float() * multiplier).to(dtype)

    def attend(self, x_TD: Tensor) -> Tensor:
        """x · weightᵀ, (T, V) fp32."""
        weight = self.held()
        if not grok_kernels.is_packed(weight):
            weight = weight[None]
        return grok_kernels.grouped_gemm(x_TD, weight, out_dtype=torch.float32)
