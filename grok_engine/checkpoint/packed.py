"""The engine's own format: the tensors of a model's modules in one file, as they lie in memory, to be read or mapped.

The file is a safetensors file, which other tools can read. The data begins at a multiple of 4096. Each tensor begins at
a multiple of 64 while the sizes before it are multiples of 64, as those of all large tensors are.

A module's values are `<module>.weight`, its scales, (E, groups, N), `<module>.scale`. The header's metadata names the
format, and gives the (E, N, K) of the values that lie in panels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from grok_engine.config import is_int
from grok_kernels.dtypes import DTYPES

from .base import CheckpointError, TensorInfo, take
from .safetensors import SafetensorsFile, StoredTensor
from .strict_json import parse_object

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
        self._file = SafetensorsFile(self.path)
        metadata = self._file.metadata
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.path}: expected format {FORMAT!r}, as `grok-engine convert` writes it, found "
                f"{metadata.get('format')!r}"
            )
        if self._file.start % ALIGN:  # the kernels read a mapped file in place
            raise CheckpointError(
                f"{self.path}: expected data at a multiple of {ALIGN}, found it at {self._file.start}"
            )
        planes = {name: _plane(self.path, tensor) for name, tensor in self._file.tensors.items()}
        self.total_bytes = sum(plane.nbytes for plane in planes.values())
        self._planes = planes
        self.tensors = _modules(self.path, planes, _panels(self.path, metadata))
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
                    count = os.preadv(file.fileno(), [part[at:]], self._file.start + start + at)
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
        return torch.frombuffer(memoryview(self._file.map())[self._file.start :], dtype=torch.uint8)

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


def _plane(path: Path, tensor: StoredTensor) -> Plane:
    if tensor.code not in _FORMATS:
        raise CheckpointError(f"{path}: {tensor.name} is {tensor.code}, expected one of {', '.join(_FORMATS)}")
    plane = Plane(tensor.name, _FORMATS[tensor.code], tensor.shape, tensor.start)
    if plane.start % DTYPES[plane.format].itemsize:
        raise CheckpointError(f"{path}: {plane.name} of {plane.format} begins at byte {plane.start}: not aligned")
    return plane


def _panels(path: Path, metadata: Mapping[str, str]) -> dict[str, list[int]]:
    """(E, N, K) of the modules whose values lie in panels."""
    panels = parse_object(metadata.get("panels", "{}").encode(), f"{path}: panels")
    for module, shape in panels.items():
        if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(is_int(n) and n > 0 for n in shape):
            raise CheckpointError(f"{path}: panels of {module} are {shape!r}, expected its (E, N, K)")
    return panels
