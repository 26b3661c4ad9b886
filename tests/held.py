"""What the weights of a filled model mean."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grok_engine.layers.weight import FusedWeight, NamedTensor, holders
from grok_engine.models.decoder import Decoder
from grok_kernels.reference.quantize import dequantize_weight


def held(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Name and values in fp32 of every tensor of a checkpoint, outputs before inputs: (N, K), of routed experts with
    their axis in front."""
    for _, module in holders(model):
        if isinstance(module, NamedTensor):
            yield module.name, module.weight.float()
            continue
        weight = module.weight.with_layout("rows")
        w_ENK = torch.stack([dequantize_weight(weight, e) for e in range(module.experts)])
        for part in module.parts:
            rows = w_ENK[:, part.start : part.stop]
            yield part.name, rows if ".moe." in part.name else rows[0]


def formats(model: Decoder) -> dict[str, str]:
    """The format of every weight, by its path in the model."""
    return {path: module.weight.format for path, module in holders(model) if isinstance(module, FusedWeight)}
