"""The packed form of weights that the CPU's kernels read fastest: the same values in another order.

A matrix (N, K) becomes (N/64, K/k, 4, 16, k), k values to 4 bytes: a run of 256 bytes holds k input columns of 64
outputs, in 4 registers' worth of 16 outputs each, so that a kernel streams it from end to end. Contiguous, it may be
written to a file and mapped as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 64  # outputs of a panel
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


def pack_weight(weight_ENK: Tensor) -> Tensor:
    """The packed form of weight (E, N, K), a copy; of any strides. ValueError for one that has none (`can_pack`)."""
    if weight_ENK.dim() != 3 or not can_pack(weight_ENK.shape[1], weight_ENK.shape[2], weight_ENK.dtype):
        raise ValueError(
            f"pack_weight: weight has shape {tuple(weight_ENK.shape)} and dtype "
            f"{str(weight_ENK.dtype).removeprefix('torch.')}, expected (E, N, K) with N a multiple of {WIDTH}, K of 4, "
            "of int8, float8_e4m3fn or bfloat16"
        )
    run = 4 // weight_ENK.dtype.itemsize
    raw = weight_ENK.view(torch.uint8) if weight_ENK.dtype == torch.float8_e4m3fn else weight_ENK
    blocks = raw.unflatten(1, (-1, _BLOCKS, _LANES)).unflatten(4, (-1, run))
    packed: Tensor = blocks.permute(0, 1, 4, 2, 3, 5).contiguous()
    return packed.view(weight_ENK.dtype)


def unpack_weight(weight: Tensor) -> Tensor:
    """(E, N, K) from the packed form; a weight that is not packed as it is."""
    if not is_packed(weight):
        return weight
    raw = weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight
    return raw.permute(0, 1, 3, 4, 2, 5).reshape(plain_shape(weight)).view(weight.dtype)
