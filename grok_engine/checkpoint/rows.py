"""The rows of a checkpoint's matrices, a few at a time: as they are stored, dequantised, or rounded to 8 bits.

Writers and loading go through a matrix in spans whose copies in fp32 stay within CHUNK bytes, whatever its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from grok_kernels.dtypes import DTYPES, FP8_MAX, TINY
from grok_kernels.formats import FORMATS, Spec

from .base import Checkpoint, TensorInfo

CHUNK = 4 << 20  # bytes in fp32
LIMITS = {"int8": 127.0, "fp8_e4m3": FP8_MAX}  # the largest values of the formats that are rounded to
# By `weights`: the format that is rounded to, and how many columns share a scale at most; 0 is all of them.
ROUNDED: dict[str, tuple[str, int]] = {
    "int8": ("int8", 0), "int8_g128": ("int8", 128), "fp8": ("fp8_e4m3", 0), "int4": ("int4", 32),
    "int4_g128": ("int4", 128),
}  # fmt: skip
Block = tuple[int, int]


def scale_groups(weights: str, k: int) -> int:
    """The fewest equal groups of K columns with a scale each that `weights` allows."""
    columns = ROUNDED[weights][1]
    return next(n for n in range(-(-k // columns), k + 1) if k % n == 0) if columns else 1


def rounded_spec(weights: str, k: int) -> Spec:
    """What a weight with k columns is rounded to; 4 bits have scales of fp16."""
    format = ROUNDED[weights][0]
    scales = torch.float16 if FORMATS[format].in_bit_planes else torch.float32
    return Spec(format, scale_groups(weights, k), 0, scales)


def row_step(info: TensorInfo, unit: int = 1) -> int:
    """Rows to convert at once: whole blocks of scales, whole panels, which hold 64, and multiples of `unit`."""
    unit = math.lcm(info.block[0] if info.block else 1, 64, unit)
    return max(CHUNK // (4 * info.shape[-1]) // unit, 1) * unit


def read_spans(info: TensorInfo, unit: int = 1) -> Iterator[slice]:
    """All rows of a matrix, in several spans where reading makes a converted copy."""
    n = info.shape[-2]
    rows = row_step(info, unit) if info.stored else n
    return (slice(at, min(at + rows, n)) for at in range(0, n, rows))


def row_chunks(
    checkpoint: Checkpoint, info: TensorInfo, expert: int | None, unit: int = 1
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first row, values (rows, K), scales (blocks of rows, blocks of columns) or None), in order, `unit` rows or a
    multiple of them at a time. A vector is one row."""
    if len(info.shape) == 1:
        values, *scales = checkpoint.read(info.name)
        yield 0, values[None], scales[0] if scales else None
        return
    for span in read_spans(info, unit):
        for at, values_NK, blocks in chunks(info, checkpoint.read(info.name, expert=expert, rows=span), unit):
            yield span.start + at, values_NK, blocks


def chunks(info: TensorInfo, planes: tuple[Tensor, ...], unit: int = 1) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """The same of rows that are read already: their number within them, values and scales."""
    values_NK, *scales = planes
    step, block = row_step(info, unit), info.block[0] if info.block else 1
    for at in range(0, len(values_NK), step):
        blocks = slice(at // block, -(-(at + step) // block))
        yield at, values_NK[at : at + step], scales[0][blocks] if scales else None


def dequantized(values_NK: Tensor, scales: Tensor | None, block: Block | None) -> Tensor:
    """values · scales in fp32, a copy. block: the rows and columns that share a scale."""
    x_NK = values_NK.float() if values_NK.element_size() < 4 else values_NK.clone()
    if scales is None:
        return x_NK
    assert block is not None
    scales_NG = expanded(scales, block, len(x_NK))
    for scale_N1, columns_NK in zip(scales_NG.split(1, 1), x_NK.split(block[1], 1), strict=True):
        columns_NK.mul_(scale_N1)
    return x_NK


def expanded(scales: Tensor, block: Block, n: int) -> Tensor:
    """Scales in fp32 with a row for each of n rows."""
    return scales.float().repeat_interleave(block[0], 0)[:n]


def rounded(x_NK: Tensor, format: str, groups: int = 1) -> tuple[Tensor, Tensor]:
    """x rounded to `format`: q, and scales (N, groups) by the largest value of each row and group of columns: amax /
    limit in fp32 or, for int4, in fp16 and such that the sum of squared errors is small (`_int4`). Overwrites x."""
    x_NGK = x_NK.unflatten(1, (groups, -1))
    if format == "int4":
        return _int4(x_NGK)
    limit = LIMITS[format]
    scale_NG = x_NGK.abs().amax(2).clamp_(min=TINY) / limit
    x_NGK.div_(scale_NG[:, :, None]).clamp_(-limit, limit)
    if format == "int8":
        x_NK.round_()
    return x_NK.to(DTYPES[format]), scale_NG


STEPS, WIDTH = 4, 0.04  # scales that are tried on either side of the first, and how far they lie apart, relative to it
PART = 1 << 16  # values whose temporaries stay in the cache


def _int4(x_NGK: Tensor) -> tuple[Tensor, Tensor]:
    """q in −8..7 and fp16 scales of small Σ (x − scale · q)².

    Tried are scales around the one that makes the group's largest value −8 (so either sign: 8 is none of the values).
    Each gives codes, and these the scale that fits them best, (Σ x · q) / (Σ q²). Tries on Gaussian values come within
    0.3 % of the error of many more.
    """
    q_NGK, scale_NG = torch.empty(x_NGK.shape, dtype=torch.int8), x_NGK.new_empty(x_NGK.shape[:2], dtype=torch.float16)
    step = max(PART // x_NGK[0].numel(), 1)
    for at in range(0, len(x_NGK), step):
        x = x_NGK[at : at + step]
        first = x.gather(2, x.abs().argmax(2, keepdim=True)) / -8
        best, least = torch.zeros_like(first), torch.zeros_like(first)  # errors count from Σ x²
        for i in range(-STEPS, STEPS + 1):
            q = _codes(x, _half(first * (1 + i * WIDTH)))
            xq, qq = (x * q).sum(2, keepdim=True), q.square().sum(2, keepdim=True)
            scale = _half(xq / qq.clamp(min=1))
            error = scale * (scale * qq - 2 * xq)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        q_NGK[at : at + step] = _codes(x, best)
        scale_NG[at : at + step] = best.squeeze(2)
    return q_NGK.flatten(1), scale_NG


def _half(scale: Tensor) -> Tensor:
    """The nearest finite fp16 numbers, in fp32."""
    return scale.clamp(-65504, 65504).half().float()


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x / torch.where(scale == 0, 1, scale)).round_().clamp_(-8, 7)
