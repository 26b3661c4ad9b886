"""Activations in 8 bits, with a scale for each token or group of its columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import GROUP, Checker
from ..dtypes import FLOATS
from .define import op, result


@op()
def quantize_fp8(x: Tensor, group_size: int = GROUP) -> tuple[Tensor, Tensor]:
    """q = e4m3(clamp(x / scale, ±448)), scale = amax / 448 of each token's group of columns.

    x (T, D) fp32 or bf16; group_size 128, or 0 for one scale a token; the last group may be short. An amax below 2⁻¹⁰⁰
    counts as 2⁻¹⁰⁰, so no scale is 0. Returns q (T, D) float8_e4m3fn and scales (T, groups) fp32.
    """
    return _check("quantize_fp8", x, group_size, torch.float8_e4m3fn)


@op()
def quantize_int8(x: Tensor, group_size: int = GROUP) -> tuple[Tensor, Tensor]:
    """q = int8(clamp(round(x / scale), ±127)), scale = amax / 127 of each token's group of columns; halves to even.

    Arguments and scales as in `quantize_fp8`. Returns q (T, D) int8 and scales (T, groups) fp32.
    """
    return _check("quantize_int8", x, group_size, torch.int8)


def _check(name: str, x: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    c = Checker(name)
    c.tensor("x", x, "T D", FLOATS)
    if group_size not in (0, GROUP):
        c.fail(f"group_size={group_size}, expected {GROUP}, or 0 for one scale a token")
    groups = -(-x.shape[1] // group_size) if group_size else 1
    return result(x.shape, dtype), result((x.shape[0], groups), torch.float32)
