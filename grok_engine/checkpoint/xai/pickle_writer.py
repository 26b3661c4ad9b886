"""Writes the release's pickles, byte for byte as CPython's own pickler would, without holding them in memory.

A file is a few hundred bytes of opcodes around the raw data, so the opcodes are emitted here and the data is
streamed from wherever it lies. The module names are those of numpy 1.x, as in the release: numpy 2 still
resolves them, whereas numpy 1 does not know the new ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from .pickles import Array

# CPython closes a frame at the first object that starts past 64 KiB, and writes byte strings of at least that
# length outside any frame.
_FRAME_TARGET = 64 * 1024
_FRAME_MIN = 4
_CHUNK = 1 << 24


@dataclass(frozen=True, slots=True)
class Data:
    """The place of an array's bytes between two pieces of opcodes."""

    which: str  # "weight" or "scales"
    nbytes: int


@dataclass(frozen=True, slots=True)
class Described:
    """Shape and dtype: all of an array that its opcodes depend on."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        total = self.dtype.itemsize
        for n in self.shape:
            total *= n
        return total


class _Frames:
    """Collects opcodes into frames, and leaves room for the data."""

    def __init__(self) -> None:
        self.pieces: list[bytes | Data] = [b"\x80\x04"]
        self._frame: list[bytes | Data] = []
        self._length = 0
        self._memo: dict[object, int] = {}
        self._memoized = 0

    def begin(self) -> None:
        """An object starts: the only place where a full frame ends."""
        if self._length >= _FRAME_TARGET:
            self.close()

    def add(self, code: bytes | Data) -> None:
        self._frame.append(code)
        self._length += code.nbytes if isinstance(code, Data) else len(code)

    def close(self) -> None:
        if self._length >= _FRAME_MIN:
            self.pieces.append(b"\x95" + self._length.to_bytes(8, "little"))
        self.pieces += self._frame
        self._frame, self._length = [], 0

    def memoize(self, key: object = None) -> None:
        if key is not None:
            self._memo[key] = self._memoized
        self._memoized += 1
        self.add(b"\x94")

    def seen(self, key: object) -> bool:
        if key not in self._memo:
            return False
        self.add(b"h" + bytes((self._memo[key],)))
        return True

    def text(self, value: str) -> None:
        self.begin()
        if not self.seen(value):
            self.add(b"\x8c" + bytes((len(value),)) + value.encode())
            self.memoize(value)

    def glob(self, module: str, name: str) -> None:
        self.begin()
        if not self.seen((module, name)):
            self.text(module)
            self.text(name)
            self.add(b"\x93")
            self.memoize((module, name))

    def integer(self, value: int) -> None:
        self.begin()
        if 0 <= value < 1 << 8:
            self.add(b"K" + value.to_bytes(1, "little"))
        elif 0 <= value < 1 << 16:
            self.add(b"M" + value.to_bytes(2, "little"))
        elif -(1 << 31) <= value < 1 << 31:
            self.add(b"J" + value.to_bytes(4, "little", signed=True))
        else:
            size = (value.bit_length() >> 3) + 1
            self.add(b"\x8a" + bytes((size,)) + value.to_bytes(size, "little", signed=True))

    def constant(self, code: bytes) -> None:
        self.begin()
        self.add(code)

    def data(self, data: Data) -> None:
        self.begin()
        n = data.nbytes
        if n < 1 << 8:
            head = b"C" + n.to_bytes(1, "little")
        elif n < 1 << 32:
            head = b"B" + n.to_bytes(4, "little")
        else:
            head = b"\x8e" + n.to_bytes(8, "little")
        if n >= _FRAME_TARGET:
            self.close()
            self.pieces += [head, data]
        else:
            self.add(head)
            self.add(data)
        self.memoize()


def pickle_pieces(weight: Described, scales: Described | None) -> list[bytes | Data]:
    """The file, in order: a bare array, or with scales an object of `__main__.QuantizedWeight8bit`."""
    f = _Frames()
    f.begin()
    if scales is None:
        _array(f, "weight", weight)
    else:
        f.glob("__main__", "QuantizedWeight8bit")
        f.constant(b")")
        f.add(b"\x81")
        f.memoize()
        f.begin()
        f.add(b"}")
        f.memoize()
        f.add(b"(")
        for name, array in (("weight", weight), ("scales", scales)):
            f.text(name)
            _array(f, name, array)
        f.add(b"ub")
    f.add(b".")
    f.close()
    return f.pieces


def _array(f: _Frames, which: str, array: Described) -> None:
    f.begin()
    f.glob("numpy.core.multiarray", "_reconstruct")
    f.begin()
    f.glob("numpy", "ndarray")
    f.begin()
    f.integer(0)
    f.add(b"\x85")
    f.memoize()
    f.begin()
    if not f.seen(b"b"):  # numpy hands out one cached object, which the memo then finds again
        f.add(b"C\x01b")
        f.memoize(b"b")
    f.add(b"\x87")
    f.memoize()
    f.add(b"R")
    f.memoize()
    f.begin()
    f.add(b"(")
    f.integer(1)
    _shape(f, array.shape)
    _dtype(f, array.dtype)
    f.constant(b"\x89")
    f.data(Data(which, array.nbytes))
    f.add(b"t")
    f.memoize()
    f.add(b"b")


def _shape(f: _Frames, shape: tuple[int, ...]) -> None:
    f.begin()
    if not shape:
        f.add(b")")
        return
    if len(shape) > 3:
        f.add(b"(")
    for n in shape:
        f.integer(n)
    f.add({1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(shape), b"t"))
    f.memoize()


def _dtype(f: _Frames, dtype: np.dtype[Any]) -> None:
    f.begin()
    if f.seen(dtype):
        return
    bf16 = dtype == np.dtype(ml_dtypes.bfloat16)
    f.glob("numpy", "dtype")
    f.begin()
    if bf16:
        f.glob("ml_dtypes", "bfloat16")
    else:
        f.text(f"{dtype.kind}{dtype.itemsize}")
    f.constant(b"\x89")
    f.constant(b"\x88")
    f.add(b"\x87")
    f.memoize()
    f.add(b"R")
    f.memoize(dtype)
    f.begin()
    f.add(b"(")
    f.integer(3)
    f.text("|" if dtype.itemsize == 1 else "<")
    for _ in range(3):
        f.constant(b"N")
    for value in (2, 2, 64) if bf16 else (-1, -1, 0):  # item size, alignment and flags: only of a registered dtype
        f.integer(value)
    f.add(b"t")
    f.memoize()
    f.add(b"b")


def write_pickle(path: Path, weight: Array, scales: Array | None) -> int:
    """Writes one tensor under `path`, whole or not at all. Returns the length of the file."""
    arrays = {"weight": weight} if scales is None else {"weight": weight, "scales": scales}
    described = {which: Described(a.shape, a.dtype) for which, a in arrays.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for piece in pickle_pieces(described["weight"], described.get("scales")):
                if isinstance(piece, Data):
                    _stream(file, arrays[piece.which])
                else:
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            length = file.tell()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return length


def _stream(file: BinaryIO, array: Array) -> None:
    for piece in _c_order(array):
        file.write(piece.reshape(-1).view(np.uint8).data)


def _c_order(array: Array) -> Iterator[Array]:
    """The array in C order, in contiguous pieces: a transposed matrix is never copied whole."""
    if array.flags.c_contiguous:
        yield array
    elif array.nbytes <= _CHUNK or array.ndim == 0:
        yield np.ascontiguousarray(array)
    elif array.ndim == 1 or array[0].nbytes <= _CHUNK:
        rows = max(1, _CHUNK // (array.nbytes // len(array)))
        for start in range(0, len(array), rows):
            yield np.ascontiguousarray(array[start : start + rows])
    else:
        for part in array:
            yield from _c_order(part)
