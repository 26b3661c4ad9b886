"""From logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FP32, Checker
from ..dtypes import FLOATS
from .define import op, result


@op()
def sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """One token a row: softmax(logits / temperature), cut to the smallest set of probability top_p, then by inverse CDF.

    The most probable tokens are kept until their sum reaches top_p (the first always is); the token is the first, in
    order of falling probability, whose running sum exceeds uniform · the kept sum. Ties go to the lower index. Sums are
    in fp64. A temperature of 0 is the largest logit, and so is a row without a distribution: one with a NaN, which counts
    as the largest, or whose largest logit is infinite. A row's token depends on that row alone.

    logits (B, V) fp32 or bf16; temperature, top_p, uniform (B,) fp32, in [0, ∞), (0, 1] and [0, 1). Returns (B,) int64.
    """
    c = Checker("sample_top_p")
    c.tensor("logits", logits, "B V", FLOATS)
    c.at_least("V of logits", c.size("V"), 1)
    c.tensor("temperature", temperature, "B", FP32)
    c.tensor("top_p", top_p, "B", FP32)
    c.tensor("uniform", uniform, "B", FP32)
    return result((logits.shape[0],), torch.int64)
