"""The engine's own format: one file of tensors as they lie in memory, to be read or mapped without a change.

The file is a safetensors file (8 bytes of header length, a JSON header of types, shapes and places, then the data), so
that other tools can look into it. It is read and written here by hand: the library neither reads into memory of the
caller's choice nor writes a model that does not fit in memory beside itself. The data begins at a multiple of 4096, and
each tensor at one of 64 as long as the sizes before it are such, which all large ones are.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from grok_engine.checkpoint.xai.pickles import CheckpointError

FILE = "weights.safetensors"
FORMAT = "grok-engine 1"
PAGE, ALIGN = 4096, 64
CHUNK = 32 << 20  # bytes that one thread reads at once
THREADS = 8
ITEM_BYTES = {"I8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class PackedInfo:
    """One tensor of the file: its type in safetensors' words, and its first byte, counted from where the data begins."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def is_packed_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model in this format."""
    return (Path(folder) / FILE).is_file()


def arrange(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> list[PackedInfo]:
    """Places without gaps for (name, dtype, shape): first those whose size keeps the next one aligned."""
    infos = [PackedInfo(name, dtype, tuple(shape), 0) for name, dtype, shape in tensors]
    infos.sort(key=lambda info: (info.nbytes % ALIGN != 0, -ITEM_BYTES[info.dtype] * (info.nbytes % ALIGN != 0)))
    placed, start = [], 0
    for info in infos:
        placed.append(PackedInfo(info.name, info.dtype, info.shape, start))
        start += info.nbytes
    return placed


def header(infos: Iterable[PackedInfo], metadata: Mapping[str, str]) -> bytes:
    """The bytes of the file before its data."""
    places = {
        info.name: {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.start, info.start + info.nbytes],
        }
        for info in infos
    }
    text = json.dumps({"__metadata__": {"format": FORMAT, **metadata}, **places}).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return len(text).to_bytes(8, "little") + text


class PackedCheckpoint:
    """An opened folder of the format: its header read and checked, no weight read yet.

    Raises CheckpointError for a file that is not whole, or not of this format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        try:
            self.tensors, self.metadata, self._data, size = _read_header(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: expected a readable file, found: {error.strerror}") from None
        self.total_bytes = sum(info.nbytes for info in self.tensors)
        if size != self._data + self.total_bytes:
            raise CheckpointError(
                f"{self.path}: expected {self._data + self.total_bytes} bytes by its header, found {size}"
            )

    def read_into(self, room: memoryview, progress: Any = None) -> None:
        """All of the data, in parts and by several threads. progress: called with the bytes done, and in all."""
        assert len(room) == self.total_bytes, (len(room), self.total_bytes)
        done = 0
        with self.path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
            starts = range(0, self.total_bytes, CHUNK)

            def read(start: int) -> int:
                part = room[start : start + CHUNK]
                at = 0
                while at < len(part):
                    count = os.preadv(file.fileno(), [part[at:]], self._data + start + at)
                    if not count:
                        raise CheckpointError(f"{self.path}: expected {len(part) - at} more bytes, found its end")
                    at += count
                return at

            for count in pool.map(read, starts):
                done += count
                if progress:
                    progress(done, self.total_bytes)

    def map(self) -> memoryview:
        """All of the data, mapped: copy-on-write, so that writing to it changes no file."""
        with self.path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[self._data :]


def _read_header(path: Path) -> tuple[tuple[PackedInfo, ...], dict[str, str], int, int]:
    """The tensors, the metadata, where the data begins, and the size of the file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path}: expected the length of a header within {size} bytes, found {length}")
        text = file.read(length)
    try:
        values = json.loads(text)
        metadata = values.pop("__metadata__", {})
        infos = [_info(name, value) for name, value in values.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a header of safetensors, found {error!r}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r}, as `grok-engine convert` writes it, found {metadata.get('format')!r}"
        )
    start = 0
    for info in sorted(infos, key=lambda info: info.start):
        if info.start != start:
            raise CheckpointError(f"{path}: expected {info.name} at byte {start} of the data, found it at {info.start}")
        start += info.nbytes
    return tuple(infos), metadata, 8 + length, size


def _info(name: str, value: Mapping[str, Any]) -> PackedInfo:
    first, last = value["data_offsets"]
    info = PackedInfo(name, value["dtype"], tuple(value["shape"]), first)
    if info.dtype not in ITEM_BYTES or any(not isinstance(n, int) or n < 0 for n in info.shape):
        raise ValueError(f"{name} is {info.dtype} {list(info.shape)}")
    if last - first != info.nbytes:
        raise ValueError(f"{name} has {last - first} bytes for {info.dtype} {list(info.shape)}")
    return info
