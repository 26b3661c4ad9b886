"""GGUF's tensor types: how many bytes a block has, and what its values are.

A block is a run of 32 or 256 consecutive columns of one row. All types are split alike, into the planes of a format of
`grok_kernels.formats`: small integers with a scale d, and for some a minimum m, for each group of columns.

The layouts are those of ggml's `ggml-common.h`. Multi-byte numbers are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Planes = tuple[NDArray[Any], ...]
_LOW_HIGH = np.array([[0], [4]], np.uint8)  # shifts: the low halves of all bytes of a run come before the high ones


@dataclass(frozen=True, slots=True)
class TensorType:
    """One type. columns: of a block. nbytes: of a block. format: that keeps all bits, of `grok_kernels.formats`. group,
    sub: columns that share a scale, and a subscale; 0 where there is none.

    split: from blocks (M, nbytes) to the format's planes: values (M, …) and others (M, groups of a block).
    """

    name: str
    columns: int
    nbytes: int
    format: str
    group: int = 0
    sub: int = 0
    split: Callable[[Bytes], Planes] | None = None


def _half(blocks: Bytes, at: int) -> NDArray[np.float16]:
    """The fp16 numbers at byte `at`, (M, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2")


def _nibbles(run: Bytes, length: int) -> Bytes:
    """4-bit values of `length` bytes each holding columns i and length + i: (M, runs, 2 · length)."""
    halves = (run.reshape(len(run), -1, 1, length) >> _LOW_HIGH & 15).astype(np.uint8, copy=False)
    return halves.reshape(len(run), -1, 2 * length)


def _q4_0(blocks: Bytes) -> Planes:
    return _nibbles(blocks[:, 2:], 16).view(np.int8) - np.int8(8), _half(blocks, 0)


def _q4_1(blocks: Bytes) -> Planes:
    return _nibbles(blocks[:, 4:], 16).view(np.int8), _half(blocks, 0), _half(blocks, 2)


def _five_bits(low: Bytes, high: Bytes) -> NDArray[np.int8]:
    """low: 16 bytes of nibbles. high: 4 bytes, bit i of which is the fifth of column i."""
    fifth = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")[:, None]
    return (_nibbles(low, 16) | fifth << 4).view(np.int8)


def _q5_0(blocks: Bytes) -> Planes:
    return _five_bits(blocks[:, 6:], blocks[:, 2:6]) - np.int8(16), _half(blocks, 0)


def _q5_1(blocks: Bytes) -> Planes:
    return _five_bits(blocks[:, 8:], blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Planes:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0)


def _k_scales(blocks: Bytes) -> Planes:
    """Of Q4_K and Q5_K: d, 8 scales, dmin and 8 minima, those of 6 bits each in 12 bytes.

    Bytes 0–3 are scales 0–3 and bytes 4–7 minima 0–3, in their low 6 bits. The high 2 bits of both and the 4-bit halves
    of bytes 8–11 make up scales and minima 4–7.
    """
    first, second, halves = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, halves & 15 | first >> 2 & 48], axis=1)
    minima = np.concatenate([second & 63, halves >> 4 | second >> 2 & 48], axis=1)
    return _half(blocks, 0), scales, _half(blocks, 2), minima


def _q4_k(blocks: Bytes) -> Planes:
    return _nibbles(blocks[:, 16:], 32).view(np.int8), *_k_scales(blocks)


def _q5_k(blocks: Bytes) -> Planes:
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit g of byte i: column i of group g
    return (_nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | fifth << 4).view(np.int8), *_k_scales(blocks)


def _q6_k(blocks: Bytes) -> Planes:
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    q = (low | high << 4).view(np.int8) - np.int8(32)
    return q, _half(blocks, 208), blocks[:, 192:208].view(np.int8)


TYPES = {  # by ggml's number
    0: TensorType("F32", 1, 4, "fp32"),
    1: TensorType("F16", 1, 2, "fp32"),
    2: TensorType("Q4_0", 32, 18, "int4", 32, 0, _q4_0),
    3: TensorType("Q4_1", 32, 20, "int4_min", 32, 0, _q4_1),
    6: TensorType("Q5_0", 32, 22, "int5", 32, 0, _q5_0),
    7: TensorType("Q5_1", 32, 24, "int5_min", 32, 0, _q5_1),
    8: TensorType("Q8_0", 32, 34, "int8", 32, 0, _q8_0),
    12: TensorType("Q4_K", 256, 144, "int4_k", 256, 32, _q4_k),
    13: TensorType("Q5_K", 256, 176, "int5_k", 256, 32, _q5_k),
    14: TensorType("Q6_K", 256, 210, "int6_k", 256, 16, _q6_k),
    30: TensorType("BF16", 1, 2, "bf16"),
}
# Not read; named in the message that says so.
OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def read_planes(kind: TensorType, rows: Bytes) -> Planes:
    """The planes of rows (N, bytes of a row) in the type's format: values (N, K), and others (N, groups)."""
    if kind.split is None:
        return (read_floats(kind, rows),)
    return tuple(plane.reshape(len(rows), -1) for plane in kind.split(rows.reshape(-1, kind.nbytes)))


def read_floats(kind: TensorType, rows: Bytes) -> Floats:
    """fp32 values (N, K) of rows (N, bytes of a row) of F32, F16 or BF16."""
    raw = np.ascontiguousarray(rows)
    if kind.name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[kind.name]).astype(np.float32)
