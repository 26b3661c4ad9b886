"""One token a row from its logits, without a sort: the place of a sum is searched by the bits of the values.

A row's weights exp(logit / temperature − largest) are written once, in fp64. The value at which the sum of all weights
from the largest down reaches a target is then found four bits at a time, by the sums above 15 thresholds: twice, for
the cut at top_p and for the draw below it. What is left is a count among equal values, in the order of their index.
One program a row: it reads 12 bytes a token and pass, 16 passes for fp32 logits and 8 for bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import jit, launch

BLOCK = 1024  # 16 sums of as many weights fill a thread's registers


@triton.jit
def _key(x, BITS: tl.constexpr):
    """The upper BITS bits of fp32 x as an integer in its order; both zeros alike."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)).to(tl.int64)


@triton.jit
def _first(logits, v, largest, nans, BLOCK: tl.constexpr):
    """The lowest index of a NaN where there are any, or else of the largest."""
    at = tl.arange(0, BLOCK)
    best = v
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < v, other=0.0).to(tl.float32)
        hit = tl.where(nans > 0, x != x, x == largest)
        best = tl.minimum(best, tl.min(tl.where(hit & (start + at < v), start + at, v)))
    return best


@triton.jit
def _search(logits, weights, v, target, STRICT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key whose weights, with all above, sum to target or, if STRICT, past it."""
    at = tl.arange(0, BLOCK)
    digits = tl.arange(0, 16).to(tl.int64)
    key = tl.full((), -(2 ** (BITS - 1)), tl.int64)
    for step in range(0, BITS // 4):
        shift = BITS - 4 - 4 * step
        bounds = key + (digits << shift)
        sums = tl.zeros((16,), tl.float64)
        for start in range(0, v, BLOCK):
            inside = start + at < v
            keys = _key(tl.load(logits + start + at, mask=inside, other=0.0).to(tl.float32), BITS)
            weight = tl.load(weights + start + at, mask=inside, other=0.0)
            sums += tl.sum(tl.where(keys[:, None] >= bounds[None, :], weight[:, None], 0.0), 0)
        reached = (sums > target) if STRICT else (sums >= target)
        key += tl.max(tl.where(reached, digits, 0)) << shift
    return key


@triton.jit
def _around(logits, weights, v, key, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the weights above a key, how many logits have it, and the weight of each."""
    at = tl.arange(0, BLOCK)
    above = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int32)
    each = tl.zeros((), tl.float64)
    for start in range(0, v, BLOCK):
        inside = start + at < v
        keys = _key(tl.load(logits + start + at, mask=inside, other=0.0).to(tl.float32), BITS)
        weight = tl.load(weights + start + at, mask=inside, other=0.0)
        tied = inside & (keys == key)
        above += tl.sum(tl.where(keys > key, weight, 0.0))
        count += tl.sum(tied.to(tl.int32))
        each = tl.maximum(each, tl.max(tl.where(tied, weight, 0.0)))
    return above, count, each


@triton.jit
def _nth(logits, v, key, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The index of the n-th logit, from 1, with this key."""
    at = tl.arange(0, BLOCK)
    seen = tl.zeros((), tl.int32)
    found = tl.zeros((), tl.int32)
    for start in range(0, v, BLOCK):
        inside = start + at < v
        x = tl.load(logits + start + at, mask=inside, other=0.0).to(tl.float32)
        tied = (inside & (_key(x, BITS) == key)).to(tl.int32)
        rank = seen + tl.cumsum(tied, 0)
        found += tl.sum(tl.where((tied == 1) & (rank == n), start + at, 0))
        seen += tl.sum(tied)
    return found


@triton.jit
def _steps(target, above, each, count, STRICT: tl.constexpr):
    """How many of `count` weights `each`, after `above`, it takes to the target, or past it."""
    short = tl.where(each > 0.0, (target - above) / tl.where(each > 0.0, each, 1.0), count.to(tl.float64))
    n = tl.floor(short) + 1.0 if STRICT else tl.ceil(short)
    return tl.minimum(tl.maximum(n, 1.0), count.to(tl.float64))


@jit(unaligned=("temperature_ptr", "top_p_ptr", "uniform_ptr"))
def _sample(
    logits_ptr, temperature_ptr, top_p_ptr, uniform_ptr, weights_ptr, tokens_ptr, v, stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits, weights = logits_ptr + row * stride, weights_ptr + row * v
    at = tl.arange(0, BLOCK)
    largest = tl.full((), -float("inf"), tl.float32)
    nans = tl.zeros((), tl.int32)
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < v, other=-float("inf")).to(tl.float32)
        nans += tl.sum((x != x).to(tl.int32))
        largest = tl.maximum(largest, tl.max(tl.where(x != x, -float("inf"), x)))
    temperature = tl.load(temperature_ptr + row)
    if (temperature == 0.0) | (nans > 0) | (tl.abs(largest) == float("inf")):
        tl.store(tokens_ptr + row, _first(logits, v, largest, nans, BLOCK).to(tl.int64))
    else:
        divisor = temperature.to(tl.float64)
        top = largest.to(tl.float64) / divisor
        total = tl.zeros((), tl.float64)
        for start in range(0, v, BLOCK):
            inside = start + at < v
            x = tl.load(logits + start + at, mask=inside, other=-float("inf")).to(tl.float64)
            weight = tl.exp(x / divisor - top)
            tl.store(weights + start + at, weight, mask=inside)
            total += tl.sum(weight)
        tl.debug_barrier()  # the weights are read by other threads than those that wrote them
        cut = tl.load(top_p_ptr + row).to(tl.float64) * total
        key = _search(logits, weights, v, cut, False, BITS, BLOCK)
        above, count, each = _around(logits, weights, v, key, BITS, BLOCK)
        kept = above + _steps(cut, above, each, count, False) * each
        draw = tl.load(uniform_ptr + row).to(tl.float64) * kept
        key = _search(logits, weights, v, draw, True, BITS, BLOCK)
        above, count, each = _around(logits, weights, v, key, BITS, BLOCK)
        n = _steps(draw, above, each, count, True).to(tl.int32)
        tl.store(tokens_ptr + row, _nth(logits, v, key, n, BITS, BLOCK).to(tl.int64))


def sample_top_p(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    b, v = logits_BV.shape
    tokens_B = torch.empty(b, dtype=torch.int64, device=logits_BV.device)
    weights_BV = torch.empty((b, v), dtype=torch.float64, device=logits_BV.device)
    launch(
        _sample, (b,), logits_BV, temperature_B.contiguous(), top_p_B.contiguous(), uniform_B.contiguous(), weights_BV,
        tokens_B, v, logits_BV.stride(0), BITS=16 if logits_BV.dtype == torch.bfloat16 else 32,
        BLOCK=min(BLOCK, triton.next_power_of_2(v)), num_warps=16,
    )  # fmt: skip
    return tokens_B
