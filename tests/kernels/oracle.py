"""Every op as its docstring states it, in float64 and one token at a time. The reference in torch is tested against it.

It shares nothing with `grok_kernels`: no torch arithmetic, no paging, no grouping of rows.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
# On a GPU, exponentials and divisions are off by 1 or 2 ulp, and tensor cores truncate sums that a CPU rounds.
SLACK = 1 if os.environ.get("GROK_TEST_DEVICE", "cpu").startswith("cpu") else 5
BF16_ROUNDING = 2.0**-8  # half an ulp, relative to the smallest number with that ulp


def f64(x: Tensor) -> Array:
    """The exact values of a tensor of any type."""
    exact: Array = x.detach().to(torch.float64).numpy()
    return exact


def assert_near(got: Tensor, exact: Array, rel: float = 1e-6, size: Any = None) -> None:
    """`got` is within rel · size of `exact`, plus half an ulp for bf16. size: by default the largest of each row."""
    assert tuple(got.shape) == exact.shape
    assert np.array_equal(np.isnan(f64(got)), np.isnan(exact))
    if not exact.size:
        return
    size = np.abs(exact).max(-1, keepdims=True) if size is None else size
    bound = SLACK * rel * size + (BF16_ROUNDING * np.abs(exact) if got.dtype == torch.bfloat16 else 0.0) + 1e-37
    error = np.abs(f64(got) - exact)
    worst = np.unravel_index(np.argmax(error - bound), error.shape)
    message = f"at {worst}: {f64(got)[worst]} for {exact[worst]}, error {error[worst]:.3g}"
    assert not (error > bound).any(), message


def product_rel(x: torch.dtype, w: torch.dtype) -> float:
    """`rel` for a product of these types: tensor cores accumulate e4m3 with about 14 bits."""
    return 5e-4 if SLACK > 1 and x == w == torch.float8_e4m3fn else 2e-6


def rms(x_TD: Array, weight_D: Array, eps: float) -> Array:
    y_TD = np.empty_like(x_TD)
    for t, x_D in enumerate(x_TD):
        y_TD[t] = weight_D * x_D / math.sqrt(sum(float(x) ** 2 for x in x_D) / len(x_D) + eps)
    return y_TD


def rope(x_TNC: Array, positions: Sequence[int], cos_sin: Array) -> Array:
    y_TNC = np.empty_like(x_TNC)
    half = x_TNC.shape[2] // 2
    for t, p in enumerate(positions):
        for i in range(half):
            cos, sin = cos_sin[p, i], cos_sin[p, half + i]
            x1, x2 = x_TNC[t, :, i], x_TNC[t, :, half + i]
            y_TNC[t, :, i], y_TNC[t, :, half + i] = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return y_TNC


def attend(
    q_NHC: Array,
    k_LGC: Array,
    v_LGC: Array,
    scale: float,
    softcap: float = 0,
    window: int = 0,
    temperature_len: int = 0,
) -> Array:
    """Attention of one request: its last N tokens over its L keys."""
    n, heads, _ = q_NHC.shape
    length, groups, _ = k_LGC.shape
    o_NHC = np.empty_like(q_NHC)
    for i in range(n):
        p = length - n + i
        keys = [j for j in range(length) if j <= p and (not window or j > p - window)]
        for h in range(heads):
            g = h // (heads // groups)
            s = scale * (k_LGC[keys, g] @ q_NHC[i, h])
            if softcap:
                s = softcap * np.tanh(s / softcap)
            if temperature_len and p > temperature_len:
                s = s * math.log2(p) / math.log2(temperature_len)
            e = np.exp(s - s.max())
            o_NHC[i, h] = e @ v_LGC[keys, g] / e.sum()
    return o_NHC


def softmax(x: Array) -> Array:
    e: Array = np.exp(x - x.max())
    return e / e.sum()


def route(x_TD: Array, router_ED: Array, k: int, softcap: float, renormalize: bool) -> tuple[Array, Array]:
    weights, experts = np.empty((len(x_TD), k)), np.empty((len(x_TD), k), dtype=np.int32)
    for t, x_D in enumerate(x_TD):
        logits = np.array([sum(x_D * row) for row in router_ED])
        if softcap:
            logits = softcap * np.tanh(logits / softcap)
        p = softmax(logits)
        best = sorted(range(len(p)), key=lambda e: (-p[e], e))[:k]
        experts[t] = best
        weights[t] = p[best] / (p[best].sum() if renormalize else 1.0)
    return weights, experts


def group(experts_TA: Array, num_experts: int) -> tuple[list[int], list[int]]:
    order: list[int] = []
    offsets = [0]
    for e in range(num_experts):
        order += [i for i, expert in enumerate(experts_TA.reshape(-1)) if expert == e]
        offsets.append(len(order))
    return order, offsets


def quantize(x_TD: Array, group_size: int, largest: int, dtype: Any) -> tuple[Array, Array]:
    """q and scales, in the fp32 arithmetic that the op defines, one group at a time."""
    x_TD = x_TD.astype(np.float32)
    t, d = x_TD.shape
    width = group_size or d
    q, scales = np.zeros((t, d), dtype=dtype), np.zeros((t, -(-d // width)), dtype=np.float32)
    for row in range(t):
        for start in range(0, d, width):
            x = x_TD[row, start : start + width]
            scale = max(np.abs(x).max(), np.float32(2.0**-100)) / np.float32(largest)
            ratio = np.clip(x / scale, -largest, largest)
            scales[row, start // width] = scale
            q[row, start : start + width] = (np.rint(ratio) if largest == 127 else ratio).astype(dtype)
    return q, scales


def quantize_fp8(x_TD: Array, group_size: int) -> tuple[Array, Array]:
    return quantize(x_TD, group_size, 448, ml_dtypes.float8_e4m3fn)


def quantize_int8(x_TD: Array, group_size: int) -> tuple[Array, Array]:
    return quantize(x_TD, group_size, 127, np.int8)


def dequantize_rows(q_TD: Array, scale: Array | None, width: int = 128) -> Array:
    x_TD = q_TD.astype(np.float64)
    if scale is None:
        return x_TD
    for row in range(len(x_TD)):
        for i in range(x_TD.shape[1]):
            x_TD[row, i] *= scale[row, i // width if scale.shape[1] > 1 else 0]
    return x_TD


def dequantize_weight(weight_ENK: Array, scale: Array | None) -> Array:
    w = weight_ENK.astype(np.float64)
    if scale is None:
        return w
    width = w.shape[2] // scale.shape[1]
    for e in range(w.shape[0]):
        for n in range(w.shape[1]):
            for i in range(w.shape[2]):
                w[e, n, i] *= scale[e, i // width, n]
    return w


def gemm(x_MK: Array, weight_ENK: Array, offsets: Sequence[int]) -> Array:
    y_MN = np.full((len(x_MK), weight_ENK.shape[1]), np.nan)
    for e in range(len(offsets) - 1):
        for m in range(offsets[e], offsets[e + 1]):
            y_MN[m] = weight_ENK[e] @ x_MK[m]
    return y_MN


def activate(x: float, name: str) -> float:
    if name == "silu":
        return x / 2 * (1 + math.tanh(x / 2))  # x · sigmoid(x) without overflow
    if name == "gelu":
        return x / 2 * (1 + math.erf(x / math.sqrt(2)))
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def moe(
    x_TD: Array,
    weights_TA: Array,
    experts_TA: Array,
    w13: Array,
    w2: Array,
    activation: str,
    act_format: str,
    bf16: bool,
) -> Array:
    """w13 and w2 are dequantised; `bf16`: x, and so the second product's input, is bf16."""

    def rounded(row: Array) -> Array:
        if act_format == "none":
            return row.astype(ml_dtypes.bfloat16).astype(np.float64) if bf16 else row
        q, scale = (quantize_fp8 if act_format == "fp8" else quantize_int8)(row[None], 128)
        return dequantize_rows(q, scale.astype(np.float64))[0]

    y_TD = np.zeros_like(x_TD)
    f = w2.shape[2]
    for t in range(len(x_TD)):
        x = rounded(x_TD[t])
        for weight, e in zip(weights_TA[t], experts_TA[t], strict=True):
            inner = [activate(w13[e, i] @ x, activation) * (w13[e, f + i] @ x) for i in range(f)]
            y_TD[t] += weight * (w2[e] @ rounded(np.array(inner)))
    return y_TD


def sample(logits_V: Array, temperature: float, top_p: float, uniform: float) -> int:
    if temperature == 0:
        return min(range(len(logits_V)), key=lambda i: (-logits_V[i], i))
    p = softmax(logits_V / temperature)
    kept: list[int] = []
    total = 0.0
    for token in sorted(range(len(p)), key=lambda i: (-logits_V[i], i)):
        if kept and total >= top_p:
            break
        kept.append(token)
        total += float(p[token])
    running = 0.0
    for token in kept:
        running += float(p[token])
        if running > uniform * total:
            return token
    return kept[-1]
