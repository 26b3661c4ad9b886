"""Reads the checkpoint format of xAI's open release: a folder of numbered pickles."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError, TensorInfo, take
from grok_engine.config import ModelConfig

from .layout import Kind, TensorSpec, layout
from .pickles import Array, MappedTensor, PickleHeader, map_pickle, read_header

FORMATS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}  # numpy's names of what a file may hold


@dataclass(frozen=True, slots=True)
class XaiFile:
    """One file of an opened release. Shapes are as stored, (in, out), dtypes by numpy's names, `nbytes` its length."""

    name: str
    index: int
    file: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    scales_shape: tuple[int, ...] | None
    scales_dtype: str | None
    nbytes: int

    @property
    def groups(self) -> int:
        """Groups of scales along the input; 0 where there are no scales."""
        return 0 if self.scales_shape is None else self.scales_shape[-2]


class XaiCheckpoint:
    """An opened checkpoint: every header checked against the configuration, no weight read yet.

    `path` holds `ckpt-0/`, or is that folder itself. Raises one CheckpointError that lists everything missing,
    superfluous, truncated, unreadable, mis-shaped or of the wrong type. Two tensors of the same shape that have
    changed places cannot be told apart.
    """

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.config = config
        self.folder = _tensor_folder(Path(path))
        specs = layout(config)
        names = {entry.name for entry in os.scandir(self.folder) if entry.name.startswith("tensor")}
        problems: list[str] = []
        headers: dict[str, PickleHeader] = {}
        files: list[XaiFile] = []
        for spec in specs:
            if spec.file not in names:
                problems.append(f"{spec.file} ({spec.name}): expected a file of shape {spec.shape}, found none")
                continue
            try:
                header = read_header(self.folder / spec.file)
            except CheckpointError as error:
                problems.append(f"{spec.file} ({spec.name}): {str(error).removeprefix(f'{self.folder / spec.file}: ')}")
                continue
            file = _file(spec, header)
            scales = header.scales
            problems += spec.problems(
                file.shape, header.weight.dtype, file.scales_shape, None if scales is None else scales.dtype
            )
            headers[spec.name] = header
            files.append(file)
        extra = sorted(names - {spec.file for spec in specs})
        problems += [
            f"{name}: expected {len(specs)} files up to {specs[-1].file}, found this one too" for name in extra
        ]
        if problems:
            head = f"{self.folder} does not hold the checkpoint of {config.name!r}, {len(problems)} problem(s):"
            raise CheckpointError("\n  ".join([head, *problems]), tuple(problems))
        self.source = str(self.folder)
        self.files = tuple(files)
        self._headers = headers
        self._specs = {spec.name: spec for spec in specs}
        self._by_name = {file.name: file for file in files}
        self.tensors = {file.name: _info(file, self._specs[file.name]) for file in files}

    def header(self, name: str) -> PickleHeader:
        """Where in which file the arrays of a tensor lie."""
        if name not in self._headers:
            raise CheckpointError(f"{self.folder}: expected the name of a tensor, found {name!r}")
        return self._headers[name]

    def arrays(self, name: str) -> MappedTensor:
        """A fresh mapping of one tensor as stored, in (in, out) layout. It ends with the last of its arrays."""
        header = self.header(name)
        tensor = map_pickle(header.path)
        info = self._by_name[name]
        found = (tensor.weight.shape, tensor.weight.dtype.name, None if tensor.scales is None else tensor.scales.shape)
        if found != (info.shape, info.dtype, info.scales_shape):
            raise CheckpointError(f"{header.path}: expected {info.dtype} {info.shape} as when opened, found {found}")
        return tensor

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`: views of a fresh mapping."""
        tensor = self.arrays(name)
        planes = [_as_torch(array) for array in (tensor.weight, tensor.scales) if array is not None]
        if self._specs[name].transposed:
            planes = [plane.mT for plane in planes]
        return take(self.tensors[name], tuple(planes), expert, rows)


def _tensor_folder(path: Path) -> Path:
    for folder in (path / "ckpt-0", path):
        if folder.is_dir() and (folder.name == "ckpt-0" or any(folder.glob("tensor*_000"))):
            return folder
    found = "no such folder" if not path.is_dir() else "neither"
    raise CheckpointError(f"{path}: expected a folder ckpt-0 in it, or files tensor00000_000 and on, found {found}")


def _file(spec: TensorSpec, header: PickleHeader) -> XaiFile:
    scales = header.scales
    return XaiFile(
        name=spec.name,
        index=spec.index,
        file=spec.file,
        kind=spec.kind,
        shape=header.weight.shape,
        dtype=header.weight.dtype.name,
        scales_shape=None if scales is None else scales.shape,
        scales_dtype=None if scales is None else scales.dtype.name,
        nbytes=header.file_size,
    )


def _info(file: XaiFile, spec: TensorSpec) -> TensorInfo:
    shape = (*file.shape[:-2], file.shape[-1], file.shape[-2]) if spec.transposed else file.shape
    block = (1, file.shape[-2] // file.groups) if file.groups else None
    return TensorInfo(name=file.name, shape=shape, format=FORMATS[file.dtype], block=block, nbytes=file.nbytes)


def _as_torch(array: Array) -> Tensor:
    """The same memory as a tensor; numpy's bf16 comes from ml_dtypes, which torch does not know."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
