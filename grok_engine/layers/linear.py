"""Dense projections."""

from __future__ import annotations

import torch
from torch import Tensor

import grok_kernels
from grok_engine.config import ActFormat

from .weight import FusedWeight


class Linear(FusedWeight):
    """y_TN = x_TK · weightᵀ; no bias. activations: the format that x is rounded to first."""

    def __init__(self, k: int, parts: dict[str, int], activations: ActFormat = "none") -> None:
        super().__init__(1, k, parts)
        self.activations = activations

    def forward(self, x_TK: Tensor) -> Tensor:
        """Of matrices that are one weight."""
        (y_TN,) = self._products(x_TK)
        return y_TN

    def split(self, x_TK: Tensor, quantized: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """y of each matrix. quantized: x in the format of `activations` with its scales, where the caller has it."""
        sizes = [[part.stop - part.start for part in run.parts] for run in self.runs]
        products = self._products(x_TK, quantized)
        return [
            y_TN for product, each in zip(products, sizes, strict=True) for y_TN in product.split_with_sizes(each, 1)
        ]

    def _products(self, x_TK: Tensor, quantized: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """With each of `weights`."""
        x_scale, dtype = None, x_TK.dtype
        if self.activations != "none":
            quantize = grok_kernels.quantize_fp8 if self.activations == "fp8" else grok_kernels.quantize_int8
            x_TK, x_scale = quantized or quantize(x_TK)
        return [grok_kernels.grouped_gemm(x_TK, weight, x_scale=x_scale, out_dtype=dtype) for weight in self.weights]


def head_product(x_TD: Tensor, head: FusedWeight, activations: ActFormat) -> Tensor:
    """x · weightᵀ of the output head, (T, V) fp32. Rows become int8 with these activations and weights of integers."""
    scale = None
    if activations == "int8" and head.weight.dtype == torch.int8:
        x_TD, scale = grok_kernels.quantize_int8(x_TD)
    return grok_kernels.grouped_gemm(x_TD, head.weight, x_scale=scale, out_dtype=torch.float32)
