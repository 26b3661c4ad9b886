"""RMS norms, alone and as the pair around a residual sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
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


class Normed(NamedTuple):
    """What a norm gives; and the same in e4m3 with scales, for products that take it so, where it was made in that pass."""

    x_TD: Tensor
    quantized: tuple[Tensor, Tensor] | None = None


def add_and_norm(
    h_TD: Tensor, delta_TD: Tensor, post: RMSNorm | None, pre: RMSNorm, fp8: bool = False
) -> tuple[Tensor, Normed]:
    """h + post(delta), and pre of that: the norm after a block and the one before the next. fp8: quantised, too."""
    weights = None if post is None else post.held(), pre.held()
    if fp8:
        h_TD, x_TD, q_TD, scale = grok_kernels.sandwich_norm_fp8(h_TD, delta_TD, *weights, pre.eps)
        return h_TD, Normed(x_TD, (q_TD, scale))
    h_TD, x_TD = grok_kernels.sandwich_norm(h_TD, delta_TD, *weights, pre.eps)
    return h_TD, Normed(x_TD)


def fuses_fp8(device: torch.device) -> tuple[bool, bool]:
    """Whether norms before the experts, and before attention's projections, are best to quantise for them in e4m3 here."""
    norm = grok_kernels.fuses("sandwich_norm_fp8", ("sandwich_norm", "quantize_fp8"), device.type)
    return norm and grok_kernels.fuses("moe_fp8", ("moe",), device.type), norm
