"""Reads the checkpoint format of xAI's open release: a folder of numbered pickles."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from grok_engine.checkpoint.base import CheckpointError, TensorInfo, all_problems, take
from grok_engine.config import ModelConfig

from .layout import TensorSpec, layout
from .pickles import Array, MappedTensor, PickleHeader, map_pickle, read_header

FORMATS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}  # numpy's names of what a file may hold


@dataclass(frozen=True, slots=True)
class XaiFile:
    """One file of an opened release: what it is, and where in it which arrays lie, (in, out) as stored."""

    spec: TensorSpec
    header: PickleHeader

    @property
    def groups(self) -> int:
        """Groups of scales along the input; 0 where there are no scales."""
        return self.header.scales.shape[-2] if self.header.scales else 0

    @property
    def info(self) -> TensorInfo:
        shape, dtype = self.header.weight.shape, self.header.weight.dtype.name
        block = (1, shape[-2] // self.groups) if self.groups else None
        if self.spec.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return TensorInfo(
            name=self.spec.name, shape=shape, format=FORMATS[dtype], block=block, nbytes=self.header.file_size
        )


class XaiCheckpoint:
    """An opened checkpoint: every header checked against the configuration, no weight read yet.

    `path` holds `ckpt-0/`, or is that folder itself. Raises one CheckpointError that lists everything missing,
    superfluous, truncated, unreadable, mis-shaped or of the wrong type. Two tensors of the same shape that have
    changed places cannot be told apart.
    """

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.config = config
        self.folder = _tensor_folder(Path(path))
        self.source = str(self.folder)
        self.files: dict[str, XaiFile] = {}
        specs = layout(config)
        names = {entry.name for entry in os.scandir(self.folder) if entry.name.startswith("tensor")}
        problems: list[str] = []
        for spec in specs:
            path = self.folder / spec.file
            if spec.file not in names:
                problems.append(f"{spec.file} ({spec.name}): expected a file of shape {spec.shape}, found none")
                continue
            try:
                header = read_header(path)
            except CheckpointError as error:
                problems.append(f"{spec.file} ({spec.name}): {str(error).removeprefix(f'{path}: ')}")
                continue
            problems += spec.problems(header.weight, header.scales)
            self.files[spec.name] = XaiFile(spec, header)
        for name in sorted(names - {spec.file for spec in specs}):
            problems.append(f"{name}: expected {len(specs)} files up to {specs[-1].file}, found this one too")
        if problems:
            head = f"{self.folder} does not hold the checkpoint of {config.name!r}, {len(problems)} problem(s):"
            raise all_problems(head, problems)
        self.tensors = {name: file.info for name, file in self.files.items()}

    def arrays(self, name: str) -> MappedTensor:
        """A fresh mapping of one tensor as stored, in (in, out) layout. It ends with the last of its arrays."""
        if name not in self.files:
            raise CheckpointError(f"{self.folder}: expected the name of a tensor, found {name!r}")
        header = self.files[name].header
        tensor = map_pickle(header.path)
        expected, found = (
            (t.weight.shape, t.weight.dtype.name, None if t.scales is None else t.scales.shape)
            for t in (header, tensor)
        )
        if found != expected:
            raise CheckpointError(f"{header.path}: expected {expected} as when opened, found {found}")
        return tensor

    def read(self, name: str, *, expert: int | None = None, rows: slice | None = None) -> tuple[Tensor, ...]:
        """As `Checkpoint.read`: views of a fresh mapping."""
        tensor = self.arrays(name)
        planes = [_as_torch(array) for array in (tensor.weight, tensor.scales) if array is not None]
        if self.files[name].spec.transposed:
            planes = [plane.mT for plane in planes]
        return take(self.tensors[name], tuple(planes), expert, rows)


def _tensor_folder(path: Path) -> Path:
    for folder in (path / "ckpt-0", path):
        if folder.is_dir() and (folder.name == "ckpt-0" or any(folder.glob("tensor*_000"))):
            return folder
    found = "none of them" if path.is_dir() else "no such folder"
    raise CheckpointError(
        f"{path}: expected config.json and safetensors files, a .gguf file, or a release: a folder ckpt-0 in it, or "
        f"files tensor00000_000 and on; found {found}"
    )


def _as_torch(array: Array) -> Tensor:
    """The same memory as a tensor; numpy's bf16 comes from ml_dtypes, which torch does not know."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
