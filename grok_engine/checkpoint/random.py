"""Random weights as a checkpoint: any architecture without files, to measure its speed."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from math import prod
from zlib import crc32

import torch
from torch import Tensor

from grok_kernels.dtypes import DTYPES
from grok_kernels.formats import FORMATS

from .base import CheckpointError, TensorInfo, take

PERIOD = 4_194_301  # numbers that are drawn, then repeated; a prime, so that no two rows of a matrix are equal
LIMITS = {"int8": 127.0, "fp8_e4m3": 448.0, "int4": 7.0}
SPREADS = {"int8": 100.0, "fp8_e4m3": 100.0, "int4": 4.0}  # approximate standard deviations of quantised values


class RandomCheckpoint:
    """Tensors that depend on their names and on `seed` alone, made when they are read, on `device`.

    Matrices have mean 0 and standard deviation K^-½, so that activations stay of the order of 1. Vectors, which are the
    weights of norms, are ones.
    """

    source = "random weights"

    def __init__(self, tensors: Iterable[TensorInfo], seed: int = 0, device: torch.device | str = "cpu") -> None:
        self.tensors = {info.name: info for info in tensors}
        self.seed, self.device = seed, device
        self._block = cache(self._draw)

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`; only what is asked for is made."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source}: expected the name of a tensor, found {name!r}")
        info = self.tensors[name]
        if len(info.shape) == 1:
            return (torch.ones(info.shape, dtype=DTYPES[info.format], device=self.device),)
        *lead, n, k = info.shape
        if rows is not None and len(lead) > (expert is not None):
            return take(info, self.read(name), None, rows)
        first, stop = (0, n) if rows is None else (rows.start, rows.stop)
        start = crc32(f"{self.seed} {name}".encode()) + ((expert or 0) * n + first) * k
        lead = lead if expert is None else []
        values = repeated(self._block(info.format, k), start, (*lead, stop - first, k))
        if info.block is None:
            return (values,)
        dtype = torch.float16 if info.scales == "fp16" else torch.float32
        shape = (*lead, stop - first, k // info.block[1])
        scales = values.new_full(shape, k**-0.5 / SPREADS[info.format], dtype=dtype)
        return values, scales

    def _draw(self, fmt: str, k: int) -> Tensor:
        normal = torch.randn(PERIOD, generator=torch.Generator().manual_seed(self.seed))
        limit = LIMITS.get(fmt)
        values = (normal * SPREADS[fmt]).clamp_(-limit, limit) if limit else normal * k**-0.5
        return values.to(FORMATS[fmt].dtype).to(self.device)


def repeated(block: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
    """A contiguous tensor of `block` repeated, beginning with its element `start` modulo its size."""
    flat = block.new_empty(prod(shape))
    for at in range(-(start % block.numel()), flat.numel(), block.numel()):
        first, stop = max(at, 0), min(at + block.numel(), flat.numel())
        flat[first:stop] = block[first - at : stop - at]
    return flat.view(shape)
