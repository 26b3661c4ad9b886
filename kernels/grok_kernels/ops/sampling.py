"""From logits to tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FP32, Checker
from ..dtypes import FLOATS
from .define import op, result


@op()
def sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """One token a row: softmax(logits / temperature), the smallest set that reaches top_p, then the inverse CDF.

    The most probable tokens are kept until their sum reaches top_p (the first always is). The result is the first of
    them, by falling probability, whose running sum exceeds uniform · the kept sum. Ties go to the lower index; sums are
    in fp64. A temperature of 0 takes the largest logit. So does a row that has no distribution: one with a NaN, which
    counts as the largest, or with an infinite largest logit. A row's token depends on that row alone.

    logits (B, V) fp32 or bf16; temperature, top_p, uniform (B,) fp32, in [0, ∞), (0, 1] and [0, 1). Returns (B,) int64.
    """
    c = Checker("sample_top_p")
    c.tensor("logits", logits, "B V", FLOATS)
    c.at_least("V of logits", c.size("V"), 1)
    c.tensor("temperature", temperature, "B", FP32)
    c.tensor("top_p", top_p, "B", FP32)
    c.tensor("uniform", uniform, "B", FP32)
    return result((logits.shape[0],), torch.int64)
