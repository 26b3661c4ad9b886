"""Token embedding, whose weight may serve the output too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import grok_kernels
from grok_kernels.layouts import Layout, unpack, values_shape

from .weight import NamedTensor, packs

ROWS = 4096  # rows converted at once, so that there is never a second whole table in memory


class Embedding(NamedTensor):
    """weight_VD, looked up by token and, where tied, the matrix of the output head, for which it may be packed."""

    def __init__(self, name: str, vocab: int, d: int, *, tied: bool) -> None:
        super().__init__(name, vocab, d)
        self.vocab, self.d, self.tied = vocab, d, tied

    def layout_for(self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None) -> Layout:
        return "panels" if self.tied and packs(self.vocab, self.d, dtype, device, packed) else "rows"

    def shape_in(self, layout: Layout, dtype: torch.dtype) -> tuple[int, ...]:
        return values_shape(layout, 1, self.vocab, self.d, dtype) if layout == "panels" else self.shape

    def fill(self, source: Tensor) -> None:
        if self.layout == "rows":
            super().fill(source)
            return
        for at in range(0, self.vocab, ROWS):
            grok_kernels.pack_into(source[None, at : at + ROWS].to(self.weight.dtype), self.weight, at)

    def values(self) -> Tensor:
        return unpack(self.weight)[0] if self.layout == "panels" else self.weight

    def forward(self, tokens_T: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
        """weight[token] · multiplier, in fp32, rounded once to `dtype`."""
        if self.layout == "panels":
            rows_TD = grok_kernels.packed_rows(self.weight, tokens_T)
        else:
            rows_TD = nn.functional.embedding(tokens_T, self.weight)
        # where the types agree, torch's product is that: computed in fp32 and rounded once
        return rows_TD * multiplier if rows_TD.dtype == dtype else (rows_TD.float() * multiplier).to(dtype)

    def attend(self, x_TD: Tensor) -> Tensor:
        """x · weightᵀ, (T, V) fp32."""
        values = self.weight if self.layout == "panels" else self.weight[None]
        weight = grok_kernels.Weight.of(values, layout=self.layout)
        return grok_kernels.grouped_gemm(x_TD, weight, out_dtype=torch.float32)
