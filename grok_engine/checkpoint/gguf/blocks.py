"""GGUF's tensor types: how many bytes a block has, and what its values are.

A block is a run of 32 or 256 consecutive columns of one row. All types are read alike, as small integers q with a scale
d, and for some a minimum m, for each group of columns: value = d · q + m, every operation rounded to fp32.

The layouts are those of ggml's `ggml-common.h`. Multi-byte numbers are little-endian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
_LOW_HIGH = np.array([[0], [4]], np.uint8)  # shifts: the low halves of all bytes of a run come before the high ones


class Groups(NamedTuple):
    """M blocks: q (M, groups, columns) int8, d (M, groups) and, for types with minima, m (M, groups)."""

    q: NDArray[np.int8]
    d: Floats
    m: Floats | None = None

    def is_finite(self) -> bool:
        """Whether all values are: fp16 numbers times the integers here stay far below fp32's largest."""
        return bool(np.isfinite(self.d).all() and (self.m is None or np.isfinite(self.m).all()))

    def values(self) -> Floats:
        """d · q + m in fp32, of the shape of q."""
        with np.errstate(all="ignore"):
            values: Floats = np.multiply(self.d[..., None], self.q, dtype=np.float32)
            if self.m is not None:
                values += self.m[..., None]
        return values


@dataclass(frozen=True, slots=True)
class TensorType:
    """One type. columns: of a block. nbytes: of a block. group: columns that share a scale, 0 for floats.

    split: from blocks (M, nbytes) to their groups. format: in which values keep all their bits, one of
    `grok_kernels.weights.FORMATS`.
    """

    name: str
    columns: int
    nbytes: int
    format: str
    group: int = 0
    split: Callable[[Bytes], Groups] | None = None


def _half(blocks: Bytes, at: int) -> Floats:
    """The fp16 numbers at byte `at`, (M, 1)."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(run: Bytes, length: int) -> Bytes:
    """4-bit values of `length` bytes each holding columns i and length + i: (M, runs, 2 · length)."""
    halves = (run.reshape(len(run), -1, 1, length) >> _LOW_HIGH & 15).astype(np.uint8, copy=False)
    return halves.reshape(len(run), -1, 2 * length)


def _q4_0(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[:, 2:], 16).view(np.int8) - np.int8(8), _half(blocks, 0))


def _q4_1(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[:, 4:], 16).view(np.int8), _half(blocks, 0), _half(blocks, 2))


def _five_bits(low: Bytes, high: Bytes) -> NDArray[np.int8]:
    """low: 16 bytes of nibbles. high: 4 bytes, bit i of which is the fifth of column i."""
    fifth = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")[:, None]
    return (_nibbles(low, 16) | fifth << 4).view(np.int8)


def _q5_0(blocks: Bytes) -> Groups:
    return Groups(_five_bits(blocks[:, 6:], blocks[:, 2:6]) - np.int8(16), _half(blocks, 0))


def _q5_1(blocks: Bytes) -> Groups:
    return Groups(_five_bits(blocks[:, 8:], blocks[:, 4:8]), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: Bytes) -> Groups:
    return Groups(blocks[:, None, 2:].view(np.int8), _half(blocks, 0))


def _k_scales(blocks: Bytes) -> tuple[Floats, Floats]:
    """Scales and negated minima (M, 8) of Q4_K and Q5_K: 6 bits each, in 12 bytes.

    Bytes 0–3 are scales 0–3 and bytes 4–7 minima 0–3, in their low 6 bits. The high 2 bits of both and the 4-bit halves
    of bytes 8–11 make up scales and minima 4–7.
    """
    first, second, halves = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 63, halves & 15 | first >> 2 & 48], axis=1)
    minima = np.concatenate([second & 63, halves >> 4 | second >> 2 & 48], axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), -(_half(blocks, 2) * minima.astype(np.float32))


def _q4_k(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[:, 16:], 32).reshape(-1, 8, 32).view(np.int8), *_k_scales(blocks))


def _q5_k(blocks: Bytes) -> Groups:
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # bit g of byte i: column i of group g
    return Groups((_nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32) | fifth << 4).view(np.int8), *_k_scales(blocks))


def _q6_k(blocks: Bytes) -> Groups:
    low = _nibbles(blocks[:, :128], 64).reshape(-1, 2, 4, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    q = (low | high << 4).view(np.int8) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Groups(q.reshape(-1, 16, 16), _half(blocks, 208) * scales)


# By ggml's number. Symmetric types are int8 with a scale per group; those with minima, and fp16, take fp32.
TYPES = {
    0: TensorType("F32", 1, 4, "fp32"),
    1: TensorType("F16", 1, 2, "fp32"),
    2: TensorType("Q4_0", 32, 18, "int8", 32, _q4_0),
    3: TensorType("Q4_1", 32, 20, "fp32", 32, _q4_1),
    6: TensorType("Q5_0", 32, 22, "int8", 32, _q5_0),
    7: TensorType("Q5_1", 32, 24, "fp32", 32, _q5_1),
    8: TensorType("Q8_0", 32, 34, "int8", 32, _q8_0),
    12: TensorType("Q4_K", 256, 144, "fp32", 32, _q4_k),
    13: TensorType("Q5_K", 256, 176, "fp32", 32, _q5_k),
    14: TensorType("Q6_K", 256, 210, "int8", 16, _q6_k),
    30: TensorType("BF16", 1, 2, "bf16"),
}
# Not read; named in the message that says so.
OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def read_groups(kind: TensorType, rows: Bytes) -> Groups:
    """The groups of rows (N, bytes of a row) of a quantised type, row by row."""
    assert kind.split is not None, kind
    with np.errstate(all="ignore"):  # NaN and infinity are values here; `is_finite` finds them
        return kind.split(rows.reshape(-1, kind.nbytes))


def read_floats(kind: TensorType, rows: Bytes) -> Floats:
    """fp32 values (N, K) of rows (N, bytes of a row) of F32, F16 or BF16."""
    raw = np.ascontiguousarray(rows)
    if kind.name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view({"F32": "<f4", "F16": "<f2"}[kind.name]).astype(np.float32)
