"""RMS norms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import register


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
