"""RMS norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import GROUP
from ..registry import register
from .quantize import quantize_fp8


@register("rms_norm", "reference")
def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.float()
    return (weight_D.float() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(x_TD.dtype)


@register("sandwich_norm", "reference")
def sandwich_norm(
    h_TD: Tensor, delta_TD: Tensor, post_D: Tensor | None, pre_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    h_TD = h_TD + (delta_TD if post_D is None else rms_norm(delta_TD, post_D, eps))
    return h_TD, rms_norm(h_TD, pre_D, eps)


@register("sandwich_norm_fp8", "reference")
def sandwich_norm_fp8(
    h_TD: Tensor, delta_TD: Tensor, post_D: Tensor | None, pre_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h_TD, y_TD = sandwich_norm(h_TD, delta_TD, post_D, pre_D, eps)
    return h_TD, y_TD, *quantize_fp8(y_TD, GROUP)
