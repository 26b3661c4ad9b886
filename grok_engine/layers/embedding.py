"""Token embedding, whose weight may serve the output too."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import grok_kernels
from grok_kernels.dtypes import NAMES

from .weight import NamedTensor, packs

ROWS = 4096  # rows converted at once, so that there is never a second whole table in memory


class Embedding(NamedTensor):
    """weight_VD, looked up by token and, where tied, the matrix of the output head, for which it may be packed."""

    def __init__(self, name: str, vocab: int, d: int, *, tied: bool) -> None:
        super().__init__(name, vocab, d)
        self.vocab, self.d, self.tied = vocab, d, tied

    def layout_for(
        self, dtype: torch.dtype, device: torch.device | str, packed: bool | None = None
    ) -> grok_kernels.Layout:
        return "panels" if self.tied and packs(self.vocab, self.d, dtype, device, packed) else "rows"

    def shape_in(self, layout: grok_kernels.Layout, dtype: torch.dtype) -> tuple[int, ...]:
        return (
            grok_kernels.values_shape(layout, 1, self.vocab, self.d, NAMES[dtype]) if layout == "panels" else self.shape
        )

    def fill(self, source: Tensor, start: int = 0) -> None:
        if self.layout == "rows":
            super().fill(source, start)
            return
        for at in range(0, len(source), ROWS):
            grok_kernels.pack_into(source[None, at : at + ROWS].to(self.weight.dtype), self.weight, start + at)

    def values(self) -> Tensor:
        return self.matrix().with_layout("rows").values[0]

    def forward(self, tokens_T: Tensor, multiplier: float, dtype: torch.dtype) -> Tensor:
        """weight[token] · multiplier, in fp32, rounded once to `dtype`."""
        if self.layout == "panels":
            rows_TD = grok_kernels.packed_rows(self.weight, tokens_T)
        else:
            rows_TD = nn.functional.embedding(tokens_T, self.weight)
        # where the types agree, torch's product is that: computed in fp32 and rounded once
        return rows_TD * multiplier if rows_TD.dtype == dtype else (rows_TD.float() * multiplier).to(dtype)

    def matrix(self) -> grok_kernels.Weight:
        """weight_VD as the products take it, (1, V, D)."""
        return grok_kernels.Weight.of(self.weight if self.layout == "panels" else self.weight[None], layout=self.layout)

    def attend(self, x_TD: Tensor) -> Tensor:
        """x · weightᵀ, (T, V) fp32."""
        return grok_kernels.grouped_gemm(x_TD, self.matrix(), out_dtype=torch.float32)
