"""The engine's own format: the tensors of a model's modules in one file, as they lie in memory, to be read or mapped.

The file is a safetensors file, which other tools can read. The data begins at a multiple of 4096. Each tensor begins at
a multiple of 64 while the sizes before it are multiples of 64, as those of all large tensors are.

A module's weight is its planes, `<module>.values`, `<module>.scales` and so on (`grok_kernels.formats`); a norm's or
the router's is `<module>.weight`. The header's metadata names the file's format, and gives format, layout and (E, N, K)
of each weight.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from grok_engine.config import is_int
from grok_kernels import Layout, Weight
from grok_kernels.dtypes import NAMES, dtype_name
from grok_kernels.formats import FORMATS

from .base import CheckpointError, TensorInfo, take
from .safetensors import SafetensorsFile, StoredTensor
from .strict_json import parse_object

FILE = "weights.safetensors"
FORMAT = "grok-engine 3"
PAGE, ALIGN = 4096, 64
CHUNK = 32 << 20  # bytes that one thread reads at once
THREADS = 8
CODES = {  # safetensors' names of the planes' dtypes
    torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.float32: "F32",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True, slots=True)
class Plane:
    """One tensor of the file. start: its first byte, counted from where the data begins."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Stored:
    """What the header says of a weight beside its planes. shape: (E, N, K)."""

    format: str
    layout: Layout
    shape: tuple[int, int, int]


def is_packed_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model in this format."""
    return (Path(folder) / FILE).is_file()


def arrange(planes: Iterable[Plane]) -> list[Plane]:
    """The planes without gaps, first those whose size keeps the next one aligned."""
    # Sizes that are multiples of ALIGN first, then the wider numbers.
    placed = sorted(planes, key=lambda plane: (plane.nbytes % ALIGN > 0) / plane.dtype.itemsize)
    starts = accumulate((plane.nbytes for plane in placed), initial=0)
    return [replace(plane, start=start) for plane, start in zip(placed, starts, strict=False)]


def header(planes: Iterable[Plane], weights: Mapping[str, Stored], model: str) -> bytes:
    """The bytes of the file before its data. weights: by module."""
    places = {
        plane.name: {
            "dtype": CODES[plane.dtype],
            "shape": list(plane.shape),
            "data_offsets": [plane.start, plane.start + plane.nbytes],
        }
        for plane in planes
    }
    said = {module: [stored.format, stored.layout, *stored.shape] for module, stored in weights.items()}
    metadata = {"format": FORMAT, "model": model, "weights": json.dumps(said)}
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
        self.weights = _weights(self.path, metadata)
        self.tensors = _modules(self.path, planes, self.weights)
        self._data: Tensor | None = None

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`: views of what `read_all` read, or else of the mapped file; values of fewer than 8 bits
        in panels are copied to rows. `weight` gives them as they lie."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: expected the name of a module, found {name!r}")
        if name not in self.weights:
            return take(self.tensors[name], (self._view(f"{name}.weight"),), expert, rows)
        weight = self.weight(name)
        if weight.layout == "panels" and FORMATS[weight.format].in_bit_planes:
            weight = weight.with_layout("rows")
        planes = weight.values, *(plane.mT for plane in weight.planes[1:])
        return take(self.tensors[name], planes, expert, rows)

    def weight(self, name: str) -> Weight:
        """A module's weight, as it lies."""
        stored = self.weights[name]
        planes = tuple(self._view(f"{name}.{plane}") for plane in FORMATS[stored.format].planes)
        return Weight(stored.format, stored.layout, stored.shape, planes)

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
        if self._data is None:
            self._data = self._map()
        plane = self._planes[name]
        return self._data[plane.start : plane.start + plane.nbytes].view(plane.dtype).view(plane.shape)


def _modules(path: Path, planes: Mapping[str, Plane], weights: Mapping[str, Stored]) -> dict[str, TensorInfo]:
    """The planes by module. A plane that belongs to none keeps its own name, under which no module will look."""
    infos = {module: _weight_info(path, module, stored, planes) for module, stored in weights.items()}
    known = {f"{module}.{name}" for module, stored in weights.items() for name in FORMATS[stored.format].planes}
    for name, plane in planes.items():
        if name not in known:
            module, _, kind = name.rpartition(".")
            module = module if kind == "weight" else name
            if module in infos:
                raise CheckpointError(f"{path}: expected either {name} or the planes of {module}, found both")
            named = NAMES.get(plane.dtype, dtype_name(plane.dtype))
            infos[module] = TensorInfo(name=module, shape=plane.shape, format=named, nbytes=plane.nbytes)
    return infos


def _weight_info(path: Path, module: str, stored: Stored, planes: Mapping[str, Plane]) -> TensorInfo:
    names = FORMATS[stored.format].planes
    if missing := [f"{module}.{name}" for name in names if f"{module}.{name}" not in planes]:
        raise CheckpointError(f"{path}: missing {', '.join(missing)} of format {stored.format}")
    own = {name: planes[f"{module}.{name}"] for name in names}
    try:  # shapes and dtypes by the check of weights, on tensors without memory
        empty = {name: torch.empty(plane.shape, dtype=plane.dtype, device="meta") for name, plane in own.items()}
        weight = Weight.of(**empty, layout=stored.layout, format=stored.format)
    except ValueError as error:
        raise CheckpointError(f"{path}: {module}: {error}") from None
    if weight.shape != stored.shape:
        raise CheckpointError(f"{path}: expected {module} to be {list(stored.shape)}, found {list(weight.shape)}")
    spec, k = weight.spec, stored.shape[2]
    return TensorInfo(
        name=module,
        shape=stored.shape,
        format=stored.format,
        block=(1, k // spec.groups) if spec.groups else None,
        sub=k // spec.subgroups if spec.subgroups else 0,
        scales="fp16" if spec.groups and spec.scales == torch.float16 else "fp32",
        layout=stored.layout,
        nbytes=sum(plane.nbytes for plane in own.values()),
    )


def _plane(path: Path, tensor: StoredTensor) -> Plane:
    if tensor.code not in _DTYPES:
        raise CheckpointError(f"{path}: {tensor.name} is {tensor.code}, expected one of {', '.join(_DTYPES)}")
    plane = Plane(tensor.name, _DTYPES[tensor.code], tensor.shape, tensor.start)
    if plane.start % plane.dtype.itemsize:
        raise CheckpointError(f"{path}: {plane.name} of {tensor.code} begins at byte {plane.start}: not aligned")
    return plane


def _weights(path: Path, metadata: Mapping[str, str]) -> dict[str, Stored]:
    """What the header says of the weights, by module."""
    found: dict[str, Stored] = {}
    for module, said in parse_object(metadata.get("weights", "{}").encode(), f"{path}: weights").items():
        fits = isinstance(said, list) and len(said) == 5 and said[0] in FORMATS and said[1] in ("rows", "panels")
        if not fits or not all(is_int(n) and n > 0 for n in said[2:]):
            raise CheckpointError(f"{path}: weight {module} is {said!r}, expected its format, layout, E, N and K")
        found[module] = Stored(said[0], said[1], (said[2], said[3], said[4]))
    return found
