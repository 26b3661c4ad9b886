"""Reads safetensors files: 8 bytes of header length, a JSON header of dtypes, shapes and offsets, then the data.

The safetensors library is not used: it can neither read into memory that the caller chose nor write a model larger than
half the memory, as converted weights need, and its errors name neither tensor nor offset.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grok_engine.config import is_int

from .base import CheckpointError
from .strict_json import MAX_BYTES, parse_object

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file. start: its first byte, counted from where the data begins."""

    name: str
    code: str  # the file's name of the dtype, a key of _DTYPES
    shape: tuple[int, ...]
    start: int

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """An opened file: its header read and checked, no data read. CheckpointError for a file that is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():  # opening a pipe would wait for ever
                raise CheckpointError(f"{path}: expected a regular file, found something else")
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= min(self.size - 8, MAX_BYTES):
                    raise CheckpointError(
                        f"{path}: expected the length of a header within {self.size} bytes and {MAX_BYTES:,}, "
                        f"found {length}"
                    )
                text = file.read(length)
        except OSError as error:
            raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
        values = parse_object(text, f"{path}: the header")
        self.start = 8 + length  # of the data
        self.metadata = _metadata(values.pop("__metadata__", {}), path)
        self.tensors = {name: _tensor(name, value, path) for name, value in values.items()}
        end = 0
        for tensor in sorted(self.tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
            if tensor.start != end:
                raise CheckpointError(
                    f"{path}: expected {tensor.name} at byte {end} of the data, found it at {tensor.start}"
                )
            end += tensor.nbytes
        if self.size != self.start + end:
            raise CheckpointError(f"{path}: expected {self.start + end} bytes by its header, found {self.size}")

    def map(self) -> mmap.mmap:
        """The whole file, mapped copy-on-write: writing to it changes no file. Views of it keep it mapped."""
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: expected a mapping of {self.size} bytes, found: {error}") from None
        if len(mapped) != self.size:  # reading beyond its end would kill the process
            raise CheckpointError(f"{self.path}: expected {self.size} bytes as when opened, found {len(mapped)}")
        return mapped

    def read(self, name: str) -> Tensor:
        """A view of a fresh mapping; a copy where the file has it at an odd address."""
        tensor = self.tensors[name]
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        at = self.start + tensor.start
        flat = torch.frombuffer(self.map(), dtype=torch.uint8, count=tensor.nbytes, offset=at)
        if at % tensor.dtype.itemsize:
            flat = flat.clone()
        return flat.view(tensor.dtype).view(tensor.shape)


def _metadata(values: Any, path: Path) -> Mapping[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise CheckpointError(f"{path}: expected __metadata__ to map text to text, found {str(values)[:80]}")
    return values


def _tensor(name: str, value: Any, path: Path) -> StoredTensor:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: expected dtype, shape and data_offsets of {name}, found {str(value)[:80]}")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {code!r}, expected one of {', '.join(_DTYPES)}")
    for what, numbers, count in (("shape", shape, None), ("data_offsets", offsets, 2)):
        if (
            not isinstance(numbers, list)
            or not all(is_int(n) and n >= 0 for n in numbers)
            or count
            not in (
                None,
                len(numbers),
            )
        ):
            raise CheckpointError(f"{path}: {name} has {what} {numbers!r}, expected integers of 0 or more")
    tensor = StoredTensor(name, code, tuple(shape), offsets[0])
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise CheckpointError(
            f"{path}: {name} has {offsets[1] - offsets[0]} bytes, expected {tensor.nbytes} for {code} {list(shape)}"
        )
    return tensor
