"""The header of a GGUF file: metadata and the places of the tensors.

    "GGUF"  version u32  tensors u64  keys u64
    keys    × (key string, type u32, value)                an array is its type u32, its length u64, its elements
    tensors × (name string, rank u32, sizes u64 × rank, type u32, offset u64)          the contiguous axis comes first
    padding to a multiple of general.alignment, which is where offsets count from

A string is its length u64 and its bytes, in UTF-8. Nothing in a file is trusted: every count and length is compared
with what is left of the header before anything of that size is made.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from grok_engine.checkpoint.base import CheckpointError

from .blocks import OTHER_TYPES, TYPES, TensorType

Value = bool | int | float | str | tuple[Any, ...]

VERSIONS = (2, 3)  # version 1 has 32-bit counts, and no file of it is left
MAX_HEADER = 64 << 20  # bytes; those of vocabularies of 256k tokens take 16 MB
MAX_KEYS, MAX_TENSORS = 1 << 12, 1 << 18
MAX_ITEMS = 1 << 21  # elements of all arrays; vocabularies of 256k tokens have 1.3 M, merges included
MAX_NAME = 1 << 10
MAX_ALIGNMENT = 1 << 16
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies. shape: outputs before inputs, experts in front, unlike the file's. start: its first byte."""

    name: str
    kind: TensorType
    shape: tuple[int, ...]
    start: int

    @property
    def row_nbytes(self) -> int:
        """Of one row, K values."""
        return self.shape[-1] // self.kind.columns * self.kind.nbytes

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_nbytes


@dataclass(frozen=True, slots=True)
class Header:
    """metadata: by key; arrays are tuples. tensors: by name. size: of the file; length, checksum: of its header."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, Place]
    size: int
    length: int
    checksum: int

    def is_current(self) -> bool:
        """Whether the file still begins with this header, and is as long as it was."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                return size == self.size and zlib.crc32(file.read(self.length)) == self.checksum
        except OSError:
            return False


def read_header(path: str | Path) -> Header:
    """The header of a file, checked against itself and against the file's size. CheckpointError for any misfit."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise CheckpointError(f"{path}: expected a GGUF file of at least 24 bytes, found {size}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _Parser(path, mapped, size).header()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None


class _Parser:
    """Reads a header from its start; `_at` is the next byte, and `_end` where a header must have ended."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self._path, self._data, self._size = path, data, size
        self._at, self._end, self._items = 0, min(size, MAX_HEADER), 0

    def header(self) -> Header:
        if (magic := self._bytes(4, "the magic number")) != b"GGUF":
            raise self._error(f"expected a file that begins with b'GGUF', found {magic!r}")
        version = self._number("I")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
            raise self._error(
                f"expected GGUF version {' or '.join(map(str, VERSIONS))}, found {version}"
                + (": the file is big-endian, which is not read" if swapped else "")
            )
        tensors, keys = self._number("Q"), self._number("Q")
        if keys > MAX_KEYS or tensors > MAX_TENSORS:
            raise self._error(
                f"expected at most {MAX_KEYS} keys and {MAX_TENSORS} tensors, found counts of {keys} and {tensors}"
            )
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self._string("a key", MAX_NAME)
            if key in metadata:
                raise self._error(f"key {key!r} is there twice")
            metadata[key] = self._value(self._number("I"), key)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, expected a power of two of at most {MAX_ALIGNMENT}")
        places: dict[str, Place] = {}
        for _ in range(tensors):
            place = self._place(alignment)
            if place.name in places:
                raise self._error(f"tensor {place.name!r} is there twice")
            places[place.name] = place
        located = self._located(places, -(-self._at // alignment) * alignment, alignment)
        checksum = zlib.crc32(memoryview(self._data)[: self._at])
        return Header(self._path, metadata, located, self._size, self._at, checksum)

    def _place(self, alignment: int) -> Place:
        name = self._string("the name of a tensor", MAX_NAME)
        rank = self._number("I")
        if not 1 <= rank <= 4:
            raise self._error(f"tensor {name!r} has rank {rank}, expected 1 to 4")
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        kind_id, offset = self._number("I"), self._number("Q")
        kind = TYPES.get(kind_id)
        if kind is None:
            found = OTHER_TYPES.get(kind_id, f"an unknown type, {kind_id}")
            raise self._error(
                f"tensor {name!r} is {found}, expected one of {', '.join(kind.name for kind in TYPES.values())}"
            )
        if min(shape) < 1 or shape[-1] % kind.columns:
            raise self._error(
                f"tensor {name!r} has shape {shape}, expected positive sizes and a multiple of {kind.columns} columns "
                f"for {kind.name}"
            )
        if offset % alignment:
            raise self._error(f"tensor {name!r} lies at {offset}, expected a multiple of the alignment {alignment}")
        return Place(name, kind, shape, offset)

    def _located(self, places: Mapping[str, Place], start: int, alignment: int) -> dict[str, Place]:
        """The same counted from the file's first byte; one lies after the other, and the file ends with the last.

        ggml writes no gaps and refuses them, since a type or a size that was changed leaves one.
        """
        end = 0
        for place in sorted(places.values(), key=lambda place: place.start):
            if place.start != (expected := -(-end // alignment) * alignment):
                raise self._error(f"tensor {place.name!r} lies at {place.start}, expected {expected}")
            end = place.start + place.nbytes
        last, padding = start + end, start + -(-end // alignment) * alignment
        if places and self._size not in (last, padding):
            raise self._error(f"the tensors end at byte {last} of a file of {self._size}, expected its end")
        return {name: Place(name, p.kind, p.shape, start + p.start) for name, p in places.items()}

    def _value(self, kind: int, key: str) -> Value:
        if kind == _STRING:
            return self._string(f"the value of {key!r}")
        if kind != _ARRAY:
            return self._scalars(kind, 1, key)[0]  # type: ignore[no-any-return]
        inner, count = self._number("I"), self._number("Q")
        self._items += count
        if self._items > MAX_ITEMS:
            raise self._error(f"key {key!r} has {count} elements, expected at most {MAX_ITEMS} in all arrays")
        return self._strings(count, key) if inner == _STRING else self._scalars(inner, count, key)

    def _scalars(self, kind: int, count: int, key: str) -> tuple[Any, ...]:
        code = _SCALARS.get(kind)
        if code is None:
            what = "arrays in an array" if kind == _ARRAY else f"values of type {kind}"
            raise self._error(f"key {key!r} holds {what}, expected numbers, booleans or strings")
        data = self._bytes(count * struct.calcsize(f"<{code}"), f"{count} values of {key!r}")
        values = struct.unpack(f"<{count}{code}", data)
        if kind != _BOOL:
            return values
        if any(value > 1 for value in values):
            raise self._error(f"key {key!r} holds the boolean {max(values)}, expected 0 or 1")
        return tuple(map(bool, values))

    def _number(self, code: str) -> int:
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}"), "a number"))
        return int(value)

    def _string(self, what: str, longest: int = MAX_HEADER) -> str:
        length = self._number("Q")
        if length > longest:
            raise self._error(f"{what} is {length} bytes long, expected at most {longest}")
        data = self._bytes(length, what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._error(f"{what} is not UTF-8: {error.reason} in {data[:40]!r}") from None

    def _strings(self, count: int, key: str) -> tuple[str, ...]:
        """As `_string`, but fast: a vocabulary and its merges are several hundred thousand strings."""
        data, at, length_at, found = self._data, self._at, struct.Struct("<Q").unpack_from, []
        last = self._end - 8
        for _ in range(count):
            (length,) = length_at(data, at) if at <= last else (0,)
            stop = at + 8 + length
            if stop > self._end:
                self._at = at
                self._check(stop - at, f"a string of {key!r}")
            found.append(data[at + 8 : stop])
            at = stop
        self._at = at
        try:
            return tuple(map(bytes.decode, found))
        except UnicodeDecodeError as error:
            raise self._error(f"a string of {key!r} is not UTF-8: {error.reason} in {error.object[:40]!r}") from None

    def _bytes(self, count: int, what: str) -> bytes:
        self._check(count, what)
        self._at += count
        return self._data[self._at - count : self._at]

    def _check(self, count: int, what: str) -> None:
        if count > self._end - self._at:
            limit = "the end of the file" if self._end == self._size else f"the limit of {MAX_HEADER} bytes"
            raise self._error(f"{what}: {count} bytes are needed, {self._end - self._at} are left before {limit}")

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {problem} (byte {self._at} of the header)")
