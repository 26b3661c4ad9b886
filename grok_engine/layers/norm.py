"""RMS norms, alone and as the pair around a residual sum."""

from __future__ import annotations

from torch import Tensor

import grok_kernels

from .weight import Table


class RMSNorm(Table):
    """weight_D in fp32."""

    def __init__(self, name: str, d: int, eps: float) -> None:
        super().__init__(name, d)
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return grok_kernels.rms_norm(x_TD, self.held(), self.eps)


def add_and_norm(h_TD: Tensor, delta_TD: Tensor, post: RMSNorm | None, pre: RMSNorm) -> tuple[Tensor, Tensor]:
    """h + post(delta), and pre of that: the norm after a block and the one before the next."""
    return grok_kernels.sandwich_norm(h_TD, delta_TD, None if post is None else post.held(), pre.held(), pre.eps)
