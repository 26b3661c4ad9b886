"""Writes the release's pickles, byte for byte as CPython's own pickler would, without holding them in memory.

A file is a few hundred bytes of opcodes around the raw data, so the opcodes are emitted here and the data is
streamed from wherever it lies. The module names are those of numpy 1.x, as in the release: numpy 2 still
resolves them, whereas numpy 1 does not know the new ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from .pickles import Array

# CPython closes a frame at the first object that starts past 64 KiB, and writes byte strings of at least that
# length outside any frame.
_FRAME_TARGET = 64 * 1024
_CHUNK = 1 << 24  # items of an array that are copied at once
_TUPLES = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}


@dataclass(frozen=True, slots=True)
class _Global:
    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Data:
    """The values of an array as one byte string."""

    array: Array


class _Pickler:
    """Protocol 4 of what an array consists of. `pieces` are opcodes, and between them the arrays whose bytes follow."""

    def __init__(self) -> None:
        self.pieces: list[bytes | Array] = [b"\x80\x04"]
        self._frame: list[bytes | Array] = []
        self._length = 0
        self._memo: dict[object, int] = {}

    def save(self, value: Any) -> None:
        if self._length >= _FRAME_TARGET:  # the start of an object is the only place where a full frame ends
            self.close()
        if isinstance(value, (str, bytes, _Global, np.dtype)) and value in self._memo:
            self.add(b"h" + bytes((self._memo[value],)))
            return
        match value:
            case None:
                self.add(b"N")
            case bool():
                self.add(b"\x88" if value else b"\x89")
            case int():
                self.add(_integer(value))
            case str():
                self.add(b"\x8c" + bytes((len(value),)) + value.encode(), memo=value)
            case bytes():
                self.add(b"C" + bytes((len(value),)) + value, memo=value)
            case tuple():
                if len(value) > 3:
                    self.add(b"(")
                for item in value:
                    self.save(item)
                self.add(_TUPLES.get(len(value), b"t"), memo=object() if value else None)
            case dict():
                self.add(b"}", memo=object())
                self.add(b"(")
                for key, item in value.items():
                    self.save(key)
                    self.save(item)
                self.add(b"u")
            case _Global():
                self.save(value.module)
                self.save(value.name)
                self.add(b"\x93", memo=value)
            case np.dtype():
                bf16 = value == np.dtype(ml_dtypes.bfloat16)
                name = _Global("ml_dtypes", "bfloat16") if bf16 else f"{value.kind}{value.itemsize}"
                order = "|" if value.itemsize == 1 else "<"
                size = (2, 2, 64) if bf16 else (-1, -1, 0)  # item size, alignment, flags: only of a registered dtype
                self._call(_Global("numpy", "dtype"), (name, False, True), value)
                self._build((3, order, None, None, None, *size))
            case np.ndarray():
                function = _Global("numpy.core.multiarray", "_reconstruct")
                self._call(function, (_Global("numpy", "ndarray"), (0,), b"b"), object())
                self._build((1, value.shape, value.dtype, False, _Data(value)))
            case _Data():
                self._save_data(value.array)

    def save_object(self, cls: _Global, attributes: dict[str, Array]) -> None:
        self.save(cls)
        self.save(())
        self.add(b"\x81", memo=object())
        self._build(attributes)

    def add(self, piece: bytes | Array, memo: object = None) -> None:
        """Append to the frame. memo: the key under which the object that this completes is found again."""
        self._frame.append(piece)
        self._length += len(piece) if isinstance(piece, bytes) else piece.nbytes
        if memo is not None:
            self._memoize(memo)

    def _memoize(self, key: object) -> None:
        self._memo[key] = len(self._memo)
        self.add(b"\x94")

    def close(self) -> None:
        """End the frame. One of less than 4 bytes, which CPython would not announce, does not occur."""
        self.pieces += [b"\x95" + self._length.to_bytes(8, "little"), *self._frame]
        self._frame, self._length = [], 0

    def _call(self, function: _Global, args: tuple[Any, ...], memo: object) -> None:
        self.save(function)
        self.save(args)
        self.add(b"R", memo)

    def _build(self, state: Any) -> None:
        self.save(state)
        self.add(b"b")

    def _save_data(self, array: Array) -> None:
        n = array.nbytes
        code, width = (b"C", 1) if n < 1 << 8 else (b"B", 4) if n < 1 << 32 else (b"\x8e", 8)
        head = code + n.to_bytes(width, "little")
        if n >= _FRAME_TARGET:
            self.close()
            self.pieces += [head, array]
        else:
            self.add(head)
            self.add(array)
        self._memoize(object())


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    size = (value.bit_length() >> 3) + 1
    return b"\x8a" + bytes((size,)) + value.to_bytes(size, "little", signed=True)


def pickle_pieces(weight: Array, scales: Array | None) -> list[bytes | Array]:
    """The file, in order: a bare array, or with scales an object of `__main__.QuantizedWeight8bit`."""
    pickler = _Pickler()
    if scales is None:
        pickler.save(weight)
    else:
        pickler.save_object(_Global("__main__", "QuantizedWeight8bit"), {"weight": weight, "scales": scales})
    pickler.add(b".")
    pickler.close()
    return pickler.pieces


def write_pickle(path: Path, weight: Array, scales: Array | None) -> int:
    """Writes one tensor under `path`, whole or not at all. Returns the length of the file."""
    with whole_file(path) as file:
        for piece in pickle_pieces(weight, scales):
            if isinstance(piece, bytes):
                file.write(piece)
            else:
                _stream(file, piece)
        return file.tell()


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets the name `path` when it is complete; an error leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _stream(file: BinaryIO, array: Array) -> None:
    """Write the array in C order, in pieces: a transposed matrix is never copied whole."""
    numbers = array.view(f"u{array.itemsize}")  # bf16 from ml_dtypes has no buffer
    for piece in np.nditer(numbers, ["external_loop", "buffered"], order="C", buffersize=_CHUNK):
        file.write(np.asarray(piece).data)
