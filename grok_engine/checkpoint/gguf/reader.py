"""A GGUF file, or a split one, as a checkpoint."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError, TensorInfo
from grok_engine.config import ModelConfig
from grok_kernels.dtypes import DTYPES
from grok_kernels.formats import FORMATS
from grok_kernels.reference.quantize import dequantize_planes

from .blocks import Bytes, TensorType, read_floats, read_planes
from .config import parse_metadata
from .files import forget_headers, read_headers
from .header import Header, Place
from .names import FACTORS, engine_names, interleaved_rows

CHUNK = 1 << 20  # values that are dequantised at once


def read_gguf_config(path: Path) -> ModelConfig:
    """The architecture that a file's metadata describes. CheckpointError for what is wrong or not served."""
    headers = read_headers(path)
    tensors = {name: place for header in headers for name, place in header.tensors.items()}
    factors: Sequence[float] = ()
    if (place := tensors.get(FACTORS)) is not None:
        file = next(header for header in headers if FACTORS in header.tensors)
        (vector,) = _matrices(place, _map(file), None)
        if vector.kind.name != "F32":
            raise CheckpointError(f"{file.path}: {FACTORS} is {vector.kind.name}, expected F32")
        factors = read_floats(vector.kind, vector.data)[0].tolist()
    return parse_metadata(headers[0], tensors, factors)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix of a tensor of a file, or one vector as a row. data: bytes (rows, bytes of a row), mapped. order: row
    n of the engine's is row order[n] of the file's."""

    kind: TensorType
    data: Bytes
    order: NDArray[np.int64] | None = None

    def rows(self, start: int, stop: int) -> Bytes:
        return self.data[start:stop] if self.order is None else self.data[self.order[start:stop]]


class GGUFCheckpoint:
    """An opened file: its header read and checked, its data mapped.

    Each type has a format that keeps all its bits (`blocks.TYPES`); F16, and tensors whose experts have several types,
    are fp32.
    """

    def __init__(self, path: Path, config: ModelConfig) -> None:
        headers = read_headers(path)
        self.source = str(path)
        orders: dict[str, NDArray[np.int64]] = {}
        if headers[0].metadata["general.architecture"] == "llama":
            orders["q"] = interleaved_rows(config.num_heads, config.head_dim)
            orders["k"] = interleaved_rows(config.num_kv_heads, config.head_dim)
        places, mapped = {}, {}
        for header in headers:
            data = _map(header)
            for name, place in header.tensors.items():
                places[name], mapped[name] = place, data
        self.tensors: dict[str, TensorInfo] = {}
        self._matrices: dict[str, list[_Matrix]] = {}
        for name, parts in engine_names(places).items():
            self.tensors[name] = self._info(name, [places[part] for part in parts])
            order = orders.get(name.rpartition(".attn.")[2])
            self._matrices[name] = [m for part in parts for m in _matrices(places[part], mapped[part], order)]
        forget_headers()  # opening the tensors is the last step of a load

    def _info(self, name: str, places: Sequence[Place]) -> TensorInfo:
        shape, kind = places[0].shape, places[0].kind
        if any(place.shape != shape for place in places):
            raise CheckpointError(
                f"{self.source}: {name} has experts of shapes {sorted({place.shape for place in places})}, expected one"
            )
        kinds = sorted({place.kind.name for place in places})
        fmt = kind.format if len(kinds) == 1 else "fp32"
        return TensorInfo(
            name=name,
            shape=shape if len(places) == 1 else (len(places), *shape),
            format=fmt,
            block=(1, kind.group) if kind.group and len(kinds) == 1 else None,
            sub=kind.sub if len(kinds) == 1 else 0,
            scales="fp16" if kind.group and len(kinds) == 1 else "fp32",
            nbytes=sum(place.nbytes for place in places),
            stored="" if kinds in (["F32"], ["BF16"]) else ", ".join(kinds),
        )

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`. The planes are copies, made of a few rows at a time."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.source}: expected the name of a tensor, found {name!r}")
        info, matrices = self.tensors[name], self._matrices[name]
        *lead, k = info.shape
        if expert is not None:
            matrices, lead = [matrices[expert]], lead[1:]
        first, stop = (rows.start, rows.stop) if rows else (0, len(matrices[0].data))
        if lead:
            lead[-1] = stop - first
        planes: list[Tensor] = []
        step = max(CHUNK // k, 1)
        for m, matrix in enumerate(matrices):
            for at in range(first, stop, step):
                parts = _planes(matrix.kind, matrix.rows(at, min(at + step, stop)), info.format)
                if parts is None:
                    raise CheckpointError(f"{self.source}: {name} holds NaN or infinity, expected finite values")
                if not planes:
                    shape = (len(matrices), stop - first)
                    planes = [part.new_empty((*shape, part.shape[1])) for part in parts]
                for plane, part in zip(planes, parts, strict=True):
                    plane[m, at - first : at - first + step] = part
        return tuple(plane.view(*lead, plane.shape[-1]) for plane in planes)


def _planes(kind: TensorType, raw: Bytes, format: str) -> tuple[Tensor, ...] | None:
    """Rows in this format, the type's own or fp32; None where not all is finite."""
    # torch warns of views of the mapped file, which are what rows of a single block become
    planes = tuple(torch.from_numpy(np.require(plane, requirements="W")) for plane in read_planes(kind, raw))
    if not all(bool(plane.isfinite().all()) for plane in planes if plane.is_floating_point()):
        return None
    if kind.split is None:
        return (planes[0].to(DTYPES[format]),)
    if format == kind.format:
        return planes
    names = FORMATS[kind.format].planes
    return (dequantize_planes(dict(zip(names, (planes[0], *(plane.t() for plane in planes[1:])), strict=True))),)


def _map(header: Header) -> Bytes:
    try:
        with header.path.open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{header.path}: expected a readable file, found: {error}") from None
    if len(data) != header.size:  # reading beyond its end would kill the process
        raise CheckpointError(f"{header.path}: expected {header.size} bytes as when opened, found {len(data)}")
    return data


def _matrices(place: Place, data: Bytes, order: NDArray[np.int64] | None) -> list[_Matrix]:
    n = place.shape[-2] if len(place.shape) > 1 else 1
    stored = data[place.start : place.start + place.nbytes].reshape(-1, n, place.row_nbytes)
    if order is None or len(order) != n:  # whose shape the model will refuse
        return [_Matrix(place.kind, matrix) for matrix in stored]
    return [_Matrix(place.kind, matrix, order) for matrix in stored]
