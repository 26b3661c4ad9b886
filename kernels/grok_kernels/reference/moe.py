"""The whole expert layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..experts import ExpertLayer
from ..registry import register
from .invariant import activate, matmul_t
from .quantize import dequantize_rows, dequantize_weight, quantized_as
from .route import group_tokens


@register("moe", "reference")
def moe(x_TD: Tensor, *args: Any) -> Tensor:
    layer = ExpertLayer(*args)
    return _layer(quantized_as(x_TD, layer.act_format), layer, x_TD.dtype)


@register("moe_fp8", "reference")
def moe_fp8(x_TD: Tensor, x_scale: Tensor, *args: Any) -> Tensor:
    layer, out_dtype = ExpertLayer.of_fp8(*args)
    return _layer(dequantize_rows(x_TD, x_scale), layer, out_dtype)


def _layer(x_TD: Tensor, layer: ExpertLayer, dtype: torch.dtype) -> Tensor:
    """The layer on fp32 rows that are already rounded to the activations' format. dtype: of the result, and of act * up
    where that is not quantised."""
    w13, w2 = layer.w13.with_layout("rows"), layer.w2.with_layout("rows")
    order, offsets = layer.order, layer.offsets
    if order is None or offsets is None:
        order, offsets = group_tokens(layer.experts, w13.shape[0])
    order = order.long()
    tokens = order // max(layer.experts.shape[1], 1)
    weights = layer.topk_weights.flatten()
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for e, (lo, hi) in enumerate(pairwise(offsets.tolist())):
        if lo == hi:
            continue
        gate, up = matmul_t(x_TD[tokens[lo:hi]], dequantize_weight(w13, e)).chunk(2, dim=-1)
        inner = activate(gate, layer.activation) * up
        inner = inner.to(dtype).float() if layer.act_format == "none" else quantized_as(inner, layer.act_format)
        out = matmul_t(inner, dequantize_weight(w2, e))
        y_TD = y_TD.index_add(0, tokens[lo:hi], out * weights[order[lo:hi], None])
    return y_TD.to(dtype)
