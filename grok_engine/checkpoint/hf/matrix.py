"""One matrix of a folder's files: floats, or 8-bit values with scales beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .files import Place

# fp16 is read as fp32, which holds it exactly; bf16 would lose three bits of its mantissa.
FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp32", "F8_E4M3": "fp8_e4m3", "I8": "int8"}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One expert's matrix, or a tensor without experts. part, parts: which of how many equal ranges of its rows.

    zeros: of an asymmetric quantisation, w = (q − z) · s, which is held in fp32.
    """

    pieces: tuple[Place, ...]  # in the order of ranks, along `axis`
    axis: int
    scale: Place | None = None
    scale_block: tuple[int, int] | None = None
    zeros: Place | None = None
    expert: int | None = None  # of a stack of `experts`
    experts: int = 1
    part: int = 0
    parts: int = 1
    head_dim: int = 0  # where the rows of each head are interleaved
    flat: bool = False  # the stack is a matrix (E · N, K), or with `transposed` (E · K, N)
    transposed: bool = False

    @property
    def block(self) -> tuple[int, int] | None:
        return None if self.zeros else self.scale_block

    @property
    def format(self) -> str:
        return "fp32" if self.zeros else FORMATS[self.pieces[0].tensor.code]

    @property
    def scale_dtype(self) -> Literal["fp32", "fp16"]:
        return "fp32"

    @property
    def stored(self) -> str:
        return "asymmetric int8" if self.zeros else "fp16" if self.pieces[0].tensor.code == "F16" else ""

    @property
    def nbytes(self) -> int:
        places = [*self.pieces, *(place for place in (self.scale, self.zeros) if place)]
        return sum(place.tensor.nbytes for place in places) // (self.parts * self.experts)

    def read(self, rows: slice | None, *, dequantised: bool) -> tuple[Tensor, ...]:
        """Values, and scales (⌈N/rows⌉, ⌈K/columns⌉) where there are any, of these rows; views unless pieces are
        joined. dequantised: their products in fp32."""
        values = self._values()
        first, stop = (rows.start, rows.stop) if rows else (0, len(values))
        if self.scale is None or self.scale_block is None:
            return (values[first:stop].float() if dequantised else values[first:stop],)
        (n, k), (height, width) = values.shape, self.scale_block
        scales = _grid(self.scale, n, k, height, width)
        if not dequantised:
            if first % height or (stop % height and stop != n):
                raise ValueError(f"rows {first}..{stop} of {n}, expected multiples of the block of {height} rows")
            return values[first:stop], scales[first // height : -(-stop // height)]
        w_NK = values[first:stop].to(torch.float32, copy=True)
        block_N = torch.arange(first, stop) // height
        if self.zeros is not None:
            w_NK.sub_(_grid(self.zeros, n, k, height, width)[block_N].repeat_interleave(width, 1)[:, :k])
        for scale_N1, columns_NK in zip(scales[block_N].split(1, 1), w_NK.split(width, 1), strict=True):
            columns_NK.mul_(scale_N1)
        return (w_NK,)

    def _values(self) -> Tensor:
        pieces = [place.file.read(place.tensor.name) for place in self.pieces]
        values = pieces[0] if len(pieces) == 1 else torch.cat(pieces, self.axis)
        if self.expert is not None:
            values = values.chunk(self.experts)[self.expert] if self.flat else values[self.expert]
        if self.transposed:
            values = values.mT
        values = values.chunk(self.parts)[self.part]
        if self.head_dim:
            values = values.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        return values


def _grid(place: Place, n: int, k: int, height: int, width: int) -> Tensor:
    """Numbers in fp32, one for each block."""
    return place.file.read(place.tensor.name).float().reshape(-(-n // height), -(-k // width))
