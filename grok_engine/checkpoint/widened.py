"""A checkpoint in formats that every device multiplies by, 8 bits or floats: for conversions, and for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from grok_kernels.formats import FORMATS
from grok_kernels.reference.quantize import dequantize_planes, group_scales

from .base import Checkpoint, TensorInfo


class WidenedCheckpoint:
    """As `Checkpoint`. Tensors of 4 to 6 bits are int8 with a scale for each of the finest groups, bit for bit, or in
    fp32 where their format has minima; int8 has scales of fp32. keep: whether a tensor stays as it is."""

    def __init__(self, checkpoint: Checkpoint, keep: Callable[[TensorInfo], bool] = lambda info: False) -> None:
        self.source, self._own = checkpoint.source, checkpoint
        self.tensors = {name: info if keep(info) else widened(info) for name, info in checkpoint.tensors.items()}

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`; what is converted is a copy."""
        planes, own = self._own.read(name, expert=expert, rows=rows), self._own.tensors.get(name)
        return planes if own is None or self.tensors[name] == own else widened_planes(own, planes)


def widened(info: TensorInfo) -> TensorInfo:
    """A tensor as `WidenedCheckpoint` has it."""
    format = FORMATS[info.format]
    if not format.in_bit_planes:
        return replace(info, scales="fp32")
    stored = info.stored or info.format
    if "minima" in format.planes:
        return replace(info, format="fp32", block=None, sub=0, scales="fp32", stored=stored)
    assert info.block is not None, info
    return replace(info, format="int8", block=(1, info.sub or info.block[1]), sub=0, scales="fp32", stored=stored)


def widened_planes(info: TensorInfo, planes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Its planes, from those of the tensor as it is."""
    named = dict(zip(FORMATS[info.format].planes, (planes[0], *(plane.mT for plane in planes[1:])), strict=True))
    if "minima" in named:
        return (dequantize_planes(named),)
    values = named["values"]
    if (zeros := named.get("zeros")) is not None:
        values = (values.unflatten(-1, (zeros.shape[-2], -1)) - zeros.mT[..., None].view(torch.int8)).flatten(-2)
    return values, group_scales(named)[0].mT
