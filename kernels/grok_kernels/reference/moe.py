"""The whole expert layer."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..packing import unpack_weight
from ..registry import register
from .invariant import activate, matmul_t
from .quantize import dequantize_rows, dequantize_weight, quantized_as
from .route import group_tokens


@register("moe", "reference")
def moe(
    x_TD: Tensor,
    topk_weights_TA: Tensor,
    experts_TA: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    activation: str,
    act_format: str,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    x = quantized_as(x_TD, act_format)
    return _layer(
        x, topk_weights_TA, experts_TA, w13, w13_scale, w2, w2_scale, activation, act_format, x_TD.dtype, order, offsets
    )  # fmt: skip


@register("moe_fp8", "reference")
def moe_fp8(
    x_TD: Tensor,
    x_scale: Tensor,
    topk_weights_TA: Tensor,
    experts_TA: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    x = dequantize_rows(x_TD, x_scale)
    return _layer(
        x, topk_weights_TA, experts_TA, w13, w13_scale, w2, w2_scale, activation, "fp8", out_dtype, order, offsets
    )  # fmt: skip


def _layer(
    x_TD: Tensor,
    topk_weights_TA: Tensor,
    experts_TA: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    activation: str,
    act_format: str,
    dtype: torch.dtype,
    order: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """The layer on rows in fp32, quantised if they are to be; `dtype` is that of its result and, if not, of act * up."""
    w13, w2 = unpack_weight(w13), unpack_weight(w2)
    if order is None or offsets is None:
        order, offsets = group_tokens(experts_TA, w13.shape[0])
    order = order.long()
    tokens = order // max(experts_TA.shape[1], 1)
    weights = topk_weights_TA.flatten()
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    bounds = offsets.tolist()
    for e, (lo, hi) in enumerate(pairwise(bounds)):
        if lo == hi:
            continue
        w13_e = dequantize_weight(w13[e], None if w13_scale is None else w13_scale[e])
        gate, up = matmul_t(x_TD[tokens[lo:hi]], w13_e).chunk(2, dim=-1)
        inner = activate(gate, activation) * up
        inner = inner.to(dtype).float() if act_format == "none" else quantized_as(inner, act_format)
        out = matmul_t(inner, dequantize_weight(w2[e], None if w2_scale is None else w2_scale[e]))
        y_TD = y_TD.index_add(0, tokens[lo:hi], out * weights[order[lo:hi], None])
    return y_TD.to(dtype)
