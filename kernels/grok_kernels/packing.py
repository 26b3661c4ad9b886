"""The packed form of weights that the CPU's kernels read fastest: the same values in another order.

A matrix (N, K) becomes (N/64, K/k, 4, 16, k), k values to 4 bytes: a run of 256 bytes holds k input columns of 64
outputs, in 4 registers' worth of 16 outputs each, so that a kernel streams it from end to end. Contiguous, it may be
written to a file and mapped as it is.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from . import registry
from .memory import weight_memory

WIDTH = 64  # outputs of a panel: rows are packed so many at a time
_BLOCKS, _LANES = 4, 16
DTYPES = (torch.int8, torch.float8_e4m3fn, torch.bfloat16)


def can_pack(n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether matrices (n, k) of `dtype` have a packed form: int8, e4m3 or bf16, n a multiple of 64 and k of 4."""
    return dtype in DTYPES and n % WIDTH == 0 and k % 4 == 0


def packed_shape(experts: int, n: int, k: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the packed form of (experts, n, k)."""
    run = 4 // dtype.itemsize
    return (experts, n // WIDTH, k // run, _BLOCKS, _LANES, run)


def is_packed(weight: Tensor) -> bool:
    return weight.dim() == 6


def plain_shape(weight: Tensor) -> tuple[int, int, int]:
    """(E, N, K) of a weight in either form."""
    if not is_packed(weight):
        experts, n, k = weight.shape
        return experts, n, k
    return weight.shape[0], weight.shape[1] * WIDTH, weight.shape[2] * weight.shape[5]


def wants_packed(n: int, k: int, dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether matrices (n, k) should be held packed for the kernels that serve the products on `device`, as it stands.

    Either form is right everywhere; the other one is only slower.
    """
    serving = {registry.preferred(op, torch.device(device).type) for op in ("grouped_gemm", "moe")}
    return can_pack(n, k, dtype) and serving == {"cpu"}


class Native(Protocol):
    """The extension's `pack_into` and `packed_rows`, for tensors on the CPU."""

    def pack_into(self, weight: Tensor, packed: Tensor, row: int) -> None: ...
    def packed_rows(self, packed: Tensor, rows: Tensor) -> Tensor: ...


_native: Native | None = None


def take_native(native: Native) -> None:
    """Use these from now on."""
    global _native
    _native = native


def pack_into(weight_ENK: Tensor, packed: Tensor, row: int = 0) -> None:
    """Write weight (E, N, K), of any strides, to the rows row..row+N−1 of a packed weight; both multiples of 64.

    ValueError where the two do not fit.
    """
    experts, rows, k = plain_shape(packed)
    fits = weight_ENK.dim() == 3 and (weight_ENK.shape[0], weight_ENK.shape[2]) == (experts, k)
    if not fits or weight_ENK.dtype != packed.dtype or not can_pack(weight_ENK.shape[1], k, packed.dtype):
        raise ValueError(
            f"pack_into: weight has shape {tuple(weight_ENK.shape)} and dtype {_name(weight_ENK.dtype)}, expected "
            f"({experts}, N, {k}) with N a multiple of {WIDTH}, of {_name(packed.dtype)}"
        )
    if row % WIDTH or not 0 <= row <= rows - weight_ENK.shape[1]:
        raise ValueError(f"pack_into: row={row}, expected a multiple of {WIDTH} in 0..{rows - weight_ENK.shape[1]}")
    if _native is not None and packed.device.type == weight_ENK.device.type == "cpu":
        _native.pack_into(weight_ENK, packed, row)
        return
    run = 4 // packed.dtype.itemsize
    blocks = _raw(weight_ENK).unflatten(1, (-1, _BLOCKS, _LANES)).unflatten(4, (-1, run))
    panels = slice(row // WIDTH, (row + weight_ENK.shape[1]) // WIDTH)
    _raw(packed)[:, panels].copy_(blocks.permute(0, 1, 4, 2, 3, 5))


def pack_weight(weight_ENK: Tensor) -> Tensor:
    """The packed form of weight (E, N, K), a copy; of any strides. ValueError for one that has none (`can_pack`).

    On a CPU it lies in huge pages, where the system has such (`weight_memory`).
    """
    if weight_ENK.dim() != 3 or not can_pack(weight_ENK.shape[1], weight_ENK.shape[2], weight_ENK.dtype):
        raise ValueError(
            f"pack_weight: weight has shape {tuple(weight_ENK.shape)} and dtype {_name(weight_ENK.dtype)}, expected "
            f"(E, N, K) with N a multiple of {WIDTH}, K of 4, of int8, float8_e4m3fn or bfloat16"
        )
    experts, n, k = weight_ENK.shape
    shape = packed_shape(experts, n, k, weight_ENK.dtype)
    packed = weight_memory(shape, weight_ENK.dtype, weight_ENK.device)
    pack_into(weight_ENK, packed)
    return packed


def unpack_weight(weight: Tensor) -> Tensor:
    """(E, N, K) from the packed form; a weight that is not packed as it is."""
    if not is_packed(weight):
        return weight
    return _raw(weight).permute(0, 1, 3, 4, 2, 5).reshape(plain_shape(weight)).view(weight.dtype)


def packed_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Rows (R,), int32, of the one matrix of a packed weight (1, N, K), as (R, K)."""
    if _native is not None and weight.device.type == rows.device.type == "cpu":
        return _native.packed_rows(weight, rows)
    panels = weight[0].flatten(2, 3)  # (N / 64, K / run, 64, run)
    panel, output = rows // WIDTH, rows % WIDTH
    return panels[panel, :, output].flatten(1)


def _raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x  # e4m3 is not copied in every layout


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
