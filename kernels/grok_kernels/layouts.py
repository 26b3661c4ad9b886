"""How the values of a weight lie in memory: "rows", (E, N, K) as it stands, or "panels", which the CPU kernels stream.

In panels a matrix (N, K) of whole bytes becomes (N/64, K/cell, 4, 16, cell), a cell being the neighbouring values along
K that 4 bytes hold. A run of 256 bytes holds one cell of each of a panel's 64 outputs, 16 outputs to a 64-byte
register, so that a kernel reads a panel from end to end. Values of fewer than 8 bits lie in bit planes (`bit_planes`).
The memory is contiguous: it may be written to a file and mapped as it is.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from . import registry
from .dtypes import dtype_name
from .formats import FORMAT_OF, FORMATS, WIDTH, Spec, values_shape
from .memory import weight_memory

_BLOCKS, _LANES = 4, 16
_BITS = {format.bits for format in FORMATS.values() if format.in_bit_planes}
PACKABLE = (torch.int8, torch.float8_e4m3fn, torch.bfloat16)


def can_pack(n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether matrices (n, k) of `dtype` can lie in panels: int8, e4m3 or bf16, n a multiple of 64 and k of 4."""
    return dtype in PACKABLE and Spec(FORMAT_OF[dtype]).can_pack(n, k)


def packed_shape(experts: int, n: int, k: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of the values (experts, n, k) of `dtype` in panels."""
    return values_shape("panels", experts, n, k, FORMAT_OF[dtype])


def logical_shape(packed: Tensor) -> tuple[int, int, int]:
    """(E, N, K) of values in panels. ValueError where `packed` has no such shape, type or strides."""
    if packed.dim() == 6 and packed.dtype == torch.uint8:
        experts, panels, blocks, bits, width, size = packed.shape
        if bits in _BITS and (width, size) == (WIDTH, 4) and packed.is_contiguous():
            return experts, panels * WIDTH, blocks * 32
    elif packed.dim() == 6:
        experts, panels, runs, _, _, cell = packed.shape
        shape = experts, panels * WIDTH, runs * cell
        fits = packed.dtype in PACKABLE and tuple(packed.shape) == packed_shape(*shape, packed.dtype)
        if fits and packed.is_contiguous():
            return shape
    raise ValueError(
        f"values have shape {tuple(packed.shape)}, strides {packed.stride()} and dtype {dtype_name(packed.dtype)}, "
        f"expected what packed_shape gives, contiguous, of {' or '.join(map(dtype_name, PACKABLE))}, or bit planes"
    )


def wants_packed(n: int, k: int, spec: Spec, device: torch.device | str) -> bool:
    """Whether panels are the faster layout of matrices (n, k) for the backend that serves the products on `device`.

    Every backend takes rows; the cuda backend alone refuses panels.
    """
    kind = torch.device(device).type
    serving = {registry.preferred(op, kind) for op in registry.PRODUCTS}
    return spec.can_pack(n, k) and serving == {"cpu"} and registry.takes_format(spec.format, kind)


class Native(Protocol):
    """Functions of the extension beside the ops, for tensors on the CPU."""

    def pack_into(self, weight: Tensor, packed: Tensor, row: int) -> None: ...
    def pack_codes(self, values: Tensor, packed: Tensor, row: int, zero_point: int) -> None: ...
    def weight_rows(self, weight: Any, rows: Tensor, multiplier: float, out_dtype: torch.dtype) -> Tensor: ...
    def scaled_sum(self, a: Tensor, b: Tensor, divisor: float) -> Tensor: ...


native: Native | None = None


def set_native(module: Native) -> None:
    """Pack and read rows on the CPU by the extension from now on."""
    global native
    native = module


def pack_into(weight_ENK: Tensor, packed: Tensor, row: int = 0) -> None:
    """Write weight (E, N, K), of any strides, to rows row..row+N−1 of values in panels; N and row multiples of 64.

    ValueError where the two do not fit.
    """
    experts, rows, k = logical_shape(packed)
    fits = weight_ENK.dim() == 3 and (weight_ENK.shape[0], weight_ENK.shape[2]) == (experts, k)
    if not fits or weight_ENK.dtype != packed.dtype or not can_pack(weight_ENK.shape[1], k, packed.dtype):
        raise ValueError(
            f"pack_into: weight has shape {tuple(weight_ENK.shape)} and dtype {dtype_name(weight_ENK.dtype)}, expected "
            f"({experts}, N, {k}) with N a multiple of {WIDTH}, of {dtype_name(packed.dtype)}"
        )
    if row % WIDTH or not 0 <= row <= rows - weight_ENK.shape[1]:
        raise ValueError(f"pack_into: row={row}, expected a multiple of {WIDTH} in 0..{rows - weight_ENK.shape[1]}")
    if native is not None and packed.device.type == weight_ENK.device.type == "cpu":
        native.pack_into(weight_ENK, packed, row)
        return
    cell = 4 // packed.dtype.itemsize
    blocks = _raw(weight_ENK).unflatten(1, (-1, _BLOCKS, _LANES)).unflatten(4, (-1, cell))
    panels = slice(row // WIDTH, (row + weight_ENK.shape[1]) // WIDTH)
    _raw(packed)[:, panels].copy_(blocks.permute(0, 1, 4, 2, 3, 5))


def pack(weight_ENK: Tensor) -> Tensor:
    """A copy of (E, N, K), of any strides, in panels. ValueError for one that cannot be packed (`can_pack`).

    On a CPU it lies in huge pages, where the system has them (`weight_memory`).
    """
    if weight_ENK.dim() != 3 or not can_pack(weight_ENK.shape[1], weight_ENK.shape[2], weight_ENK.dtype):
        raise ValueError(
            f"pack: weight has shape {tuple(weight_ENK.shape)} and dtype {dtype_name(weight_ENK.dtype)}, expected "
            f"(E, N, K) with N a multiple of {WIDTH}, K of 4, of int8, float8_e4m3fn or bfloat16"
        )
    experts, n, k = weight_ENK.shape
    packed = weight_memory(packed_shape(experts, n, k, weight_ENK.dtype), weight_ENK.dtype, weight_ENK.device)
    pack_into(weight_ENK, packed)
    return packed


def unpack(packed: Tensor) -> Tensor:
    """(E, N, K), a copy, of values in panels."""
    return _raw(packed).permute(0, 1, 3, 4, 2, 5).reshape(logical_shape(packed)).view(packed.dtype)


def _raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x  # torch copies e4m3 in some layouts only
