"""RMS norms, alone and around a residual sum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import GROUP, Checker
from ..dtypes import FLOATS
from .define import op, result


@op()
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y_TD = weight_D * x_TD * rsqrt(mean_D(x²) + eps), in fp32, rounded once to x's dtype.

    x (T, D) fp32 or bf16; weight (D,) fp32 or bf16, plain (not 1 + weight). Returns (T, D) of x's dtype.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    c = Checker("rms_norm")
    c.tensor("x", x, "T D", FLOATS)
    c.tensor("weight", weight, "D", FLOATS)
    c.at_least("eps", eps, 0.0)
    return result(x.shape, x.dtype)


@op()
def sandwich_norm(
    h: Tensor, delta: Tensor, post_weight: Tensor | None, pre_weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """h' = h + rms(delta, post_weight); y = rms(h', pre_weight): the norm after a block and the one before the next.

    post_weight None adds delta itself (models without a norm after a block). Each of the three results rounds to h's
    dtype. h, delta (T, D) fp32 or bf16, of one dtype; weights (D,) fp32 or bf16. Returns (h', y), new tensors (T, D) of
    h's dtype; h is not written.
    """
    _check_sandwich("sandwich_norm", h, delta, post_weight, pre_weight, eps)
    return result(h.shape, h.dtype), result(h.shape, h.dtype)


@op()
def sandwich_norm_fp8(
    h: Tensor, delta: Tensor, post_weight: Tensor | None, pre_weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sandwich_norm` and `quantize_fp8` of its y in groups of 128, in one pass: what a router and `moe_fp8` take.

    Arguments as for `sandwich_norm`. Returns (h', y, q, scale), q (T, D) float8_e4m3fn and scale (T, ⌈D/128⌉) fp32:
    bit for bit what the backend's two ops return.
    """
    _check_sandwich("sandwich_norm_fp8", h, delta, post_weight, pre_weight, eps)
    t, d = h.shape
    scales = result((t, -(-d // GROUP)), torch.float32)
    return result((t, d), h.dtype), result((t, d), h.dtype), result((t, d), torch.float8_e4m3fn), scales


def _check_sandwich(
    name: str, h: Tensor, delta: Tensor, post_weight: Tensor | None, pre_weight: Tensor, eps: float
) -> None:
    c = Checker(name)
    c.tensor("h", h, "T D", FLOATS)
    c.tensor("delta", delta, "T D", FLOATS)
    c.same_dtype("delta", delta, "h", h)
    if post_weight is not None:
        c.tensor("post_weight", post_weight, "D", FLOATS)
    c.tensor("pre_weight", pre_weight, "D", FLOATS)
    c.at_least("eps", eps, 0.0)
