"""The engine's own format: the tensors of a model's modules in one file, as they lie in memory, to be read or mapped.

The file is a safetensors file (8 bytes of header length, a JSON header of dtypes, shapes and offsets, then the data),
which other tools can read. The safetensors library is not used: it can neither read into memory that the caller
chose, nor write a model larger than half the memory. The data begins at a multiple of 4096. Each tensor begins at a
multiple of 64 while the sizes before it are multiples of 64, as those of all large tensors are.

A module's values are `<module>.weight`, its scales, (E, groups, N), `<module>.scale`. The header's metadata names the
format, and gives the (E, N, K) of the values that lie in panels.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grok_kernels.dtypes import DTYPES

from .base import CheckpointError, TensorInfo, take

FILE = "weights.safetensors"
FORMAT = "grok-engine 2"
PAGE, ALIGN = 4096, 64
CHUNK = 32 << 20  # bytes that one thread reads at once
THREADS = 8
CODES = {"int8": "I8", "fp8_e4m3": "F8_E4M3", "bf16": "BF16", "fp32": "F32"}  # safetensors' names of our formats
_FORMATS = {code: name for name, code in CODES.items()}


@dataclass(frozen=True, slots=True)
class Plane:
    """One tensor of the file. start: its first byte, counted from where the data begins."""

    name: str
    format: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPES[self.format].itemsize


def is_packed_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model in this format."""
    return (Path(folder) / FILE).is_file()


def arrange(planes: Iterable[Plane]) -> list[Plane]:
    """The planes without gaps, first those whose size keeps the next one aligned."""
    # Sizes that are multiples of ALIGN first, then the wider numbers.
    placed = sorted(planes, key=lambda plane: (plane.nbytes % ALIGN > 0) / DTYPES[plane.format].itemsize)
    starts = accumulate((plane.nbytes for plane in placed), initial=0)
    return [replace(plane, start=start) for plane, start in zip(placed, starts, strict=False)]


def header(planes: Iterable[Plane], panels: Mapping[str, Sequence[int]], model: str) -> bytes:
    """The bytes of the file before its data. panels: (E, N, K) of the modules whose values lie in panels."""
    places = {
        plane.name: {
            "dtype": CODES[plane.format],
            "shape": list(plane.shape),
            "data_offsets": [plane.start, plane.start + plane.nbytes],
        }
        for plane in planes
    }
    metadata = {"format": FORMAT, "model": model, "panels": json.dumps(panels)}
    text = json.dumps({"__metadata__": metadata, **places}).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return len(text).to_bytes(8, "little") + text


class PackedCheckpoint:
    """An opened folder of the format, its header read and checked. Its tensors are named by the modules they are of.

    Raises CheckpointError for a file that is not whole, or not of this format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE
        self.source = str(self.path)
        try:
            planes, panels, self._start, size = _read_header(self.path)
        except OSError as error:
            raise CheckpointError(f"{self.path}: expected a readable file, found: {error.strerror}") from None
        self.total_bytes = sum(plane.nbytes for plane in planes.values())
        if size != self._start + self.total_bytes:
            raise CheckpointError(
                f"{self.path}: expected {self._start + self.total_bytes} bytes by its header, found {size}"
            )
        self._planes = planes
        self.tensors = _modules(self.path, planes, panels)
        self._data: Tensor | None = None

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`: views of what `read_all` read, or else of the mapped file."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: expected the name of a module, found {name!r}")
        if self._data is None:
            self._data = self._map()
        values = self._view(f"{name}.weight")
        if self.tensors[name].block is None:
            return take(self.tensors[name], (values,), expert, rows)
        return take(self.tensors[name], (values, self._view(f"{name}.scale").mT), expert, rows)

    def read_all(self, room: Tensor, progress: Callable[[int, int], None] | None = None) -> None:
        """Read all of the data into `room`, uint8 of `total_bytes`, by several threads; `read` then gives views of it.

        progress: called with the bytes done, and in all.
        """
        assert len(room) == self.total_bytes, (len(room), self.total_bytes)
        into, done = room.numpy().data, 0
        with self.path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:

            def read(start: int) -> int:
                part = into[start : start + CHUNK]
                at = 0
                while at < len(part):
                    count = os.preadv(file.fileno(), [part[at:]], self._start + start + at)
                    if not count:
                        raise CheckpointError(f"{self.path}: expected {len(part) - at} more bytes, found its end")
                    at += count
                return at

            for count in pool.map(read, range(0, self.total_bytes, CHUNK)):
                done += count
                if progress:
                    progress(done, self.total_bytes)
        self._data = room

    def _map(self) -> Tensor:
        """All of the data, mapped copy-on-write: writing to it changes no file."""
        with self.path.open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        return torch.frombuffer(mapped[self._start :], dtype=torch.uint8)

    def _view(self, name: str) -> Tensor:
        assert self._data is not None
        plane = self._planes[name]
        return self._data[plane.start : plane.start + plane.nbytes].view(DTYPES[plane.format]).view(plane.shape)


def _modules(path: Path, planes: Mapping[str, Plane], panels: Mapping[str, Sequence[int]]) -> dict[str, TensorInfo]:
    """The planes by module. A plane that belongs to none keeps its own name, under which no module will look."""
    infos = {}
    for name, plane in planes.items():
        module, _, kind = name.rpartition(".")
        if kind == "scale" and f"{module}.weight" in planes:
            continue
        module = module if kind == "weight" else name
        shape = tuple(panels.get(module, plane.shape))
        scale = planes.get(f"{module}.scale")
        if prod(shape) != prod(plane.shape):
            raise CheckpointError(f"{path}: expected {name} {list(plane.shape)} to hold the values of {list(shape)}")
        infos[module] = TensorInfo(
            name=module,
            shape=shape,
            format=plane.format,
            block=None if scale is None else (1, _columns(path, scale, shape)),
            layout="panels" if module in panels else "rows",
            nbytes=plane.nbytes + (0 if scale is None else scale.nbytes),
        )
    return infos


def _columns(path: Path, scale: Plane, shape: tuple[int, ...]) -> int:
    """Columns along K that share a scale, of values (E, N, K)."""
    groups = scale.shape[1] if len(scale.shape) == len(shape) == 3 else 0
    if groups < 1 or scale.format != "fp32" or scale.shape != (shape[0], groups, shape[1]) or shape[2] % groups:
        raise CheckpointError(
            f"{path}: {scale.name} is {scale.format} {scale.shape}, expected fp32 (E, groups, N) for values (E, N, K) "
            f"of {shape}, with groups that divide K"
        )
    return shape[2] // groups


def _read_header(path: Path) -> tuple[dict[str, Plane], dict[str, list[int]], int, int]:
    """The planes, the shapes of those in panels, where the data begins, and the size of the file."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise CheckpointError(f"{path}: expected the length of a header within {size} bytes, found {length}")
        text = file.read(length)
    try:
        values = json.loads(text)
        metadata = values.pop("__metadata__", {})
        planes = {name: _plane(name, value) for name, value in values.items()}
        panels = json.loads(metadata.get("panels", "{}"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: expected a header of safetensors, found {error!r}") from None
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r}, as `grok-engine convert` writes it, found {metadata.get('format')!r}"
        )
    if (8 + length) % ALIGN:
        raise CheckpointError(f"{path}: expected its data to begin at a multiple of {ALIGN}, found it at {8 + length}")
    start = 0
    for plane in sorted(planes.values(), key=lambda plane: plane.start):
        if plane.start != start:
            raise CheckpointError(
                f"{path}: expected {plane.name} at byte {start} of the data, found it at {plane.start}"
            )
        if start % DTYPES[plane.format].itemsize:
            raise CheckpointError(f"{path}: {plane.name} of {plane.format} begins at byte {start}, expected a multiple")
        start += plane.nbytes
    return planes, panels, 8 + length, size


def _plane(name: str, value: Mapping[str, Any]) -> Plane:
    first, last = value["data_offsets"]
    if value["dtype"] not in _FORMATS or any(not isinstance(n, int) or n < 0 for n in value["shape"]):
        raise ValueError(f"{name} is {value['dtype']} {value['shape']}")
    plane = Plane(name, _FORMATS[value["dtype"]], tuple(value["shape"]), first)
    if last - first != plane.nbytes:
        raise ValueError(f"{name} has {last - first} bytes for {value['dtype']} {value['shape']}")
    return plane
