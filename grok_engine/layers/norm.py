"""RMS norms, and the residual stream that fuses each with the addition before it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

import grok_kernels

from .weight import NamedTensor

Fp8Reader = Literal["linear", "experts"]


class RMSNorm(NamedTensor):
    """y_TD = rms(x, weight_D), the weight in fp32. fp8_for: what reads y, if that multiplies rows in e4m3."""

    def __init__(self, name: str, d: int, eps: float, fp8_for: Fp8Reader | None = None) -> None:
        super().__init__(name, d)
        self.eps, self.fp8_for = eps, fp8_for

    def forward(self, x_TD: Tensor) -> Tensor:
        return grok_kernels.rms_norm(x_TD, self.weight, self.eps)

    def quantizes(self, device: str) -> bool:
        """Whether the norm is to quantise y too: its backend does both in one pass, and the reader takes e4m3 rows."""
        if self.fp8_for is None:
            return False
        if self.fp8_for == "experts" and not grok_kernels.fuses("moe_fp8", ("moe",), device):
            return False
        return grok_kernels.fuses("sandwich_norm_fp8", ("sandwich_norm", "quantize_fp8"), device)


class Normed(NamedTuple):
    """The result of a norm and, where the norm quantised it, the same in e4m3 with scales per group of 128."""

    x_TD: Tensor
    quantized: tuple[Tensor, Tensor] | None = None


class Residual:
    """The residual stream h. An addition waits for the next norm, and one pass computes both."""

    def __init__(self, h_TD: Tensor) -> None:
        self._h_TD = h_TD
        self._added: tuple[Tensor, RMSNorm | None] | None = None

    def add(self, delta_TD: Tensor, post: RMSNorm | None) -> None:
        """h += post(delta), or delta itself without a norm."""
        self._added = delta_TD, post

    def normed(self, pre: RMSNorm) -> Normed:
        """pre(h)."""
        if self._added is None:
            return Normed(pre(self._h_TD))
        (delta_TD, post), self._added = self._added, None
        args = self._h_TD, delta_TD, None if post is None else post.weight, pre.weight, pre.eps
        if pre.quantizes(delta_TD.device.type):
            self._h_TD, x_TD, q_TD, scale = grok_kernels.sandwich_norm_fp8(*args)
            return Normed(x_TD, (q_TD, scale))
        self._h_TD, x_TD = grok_kernels.sandwich_norm(*args)
        return Normed(x_TD)
