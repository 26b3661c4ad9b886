"""Reads the checkpoint format of xAI's open release: a folder of numbered pickles."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grok_engine.checkpoint.quantize import quantize_matrix
from grok_engine.config import ModelConfig

from .layout import Kind, TensorSpec, layout
from .pickles import CheckpointError, MappedTensor, PickleHeader, map_pickle, read_header
from .writer import write_xai

__all__ = [
    "CheckpointError",
    "MappedTensor",
    "TensorInfo",
    "TensorSpec",
    "XaiCheckpoint",
    "layout",
    "quantize_matrix",
    "write_xai",
]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of an opened checkpoint. `nbytes` is the length of its file; dtypes are numpy's names."""

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

    config: ModelConfig
    folder: Path
    tensors: Sequence[TensorInfo]

    def __init__(self, path: str | Path, config: ModelConfig) -> None:
        self.config = config
        self.folder = _tensor_folder(Path(path))
        specs = layout(config)
        names = {entry.name for entry in os.scandir(self.folder) if entry.name.startswith("tensor")}
        problems: list[str] = []
        headers: dict[str, PickleHeader] = {}
        infos: list[TensorInfo] = []
        for spec in specs:
            if spec.file not in names:
                problems.append(f"{spec.file} ({spec.name}): expected a file of shape {spec.shape}, found none")
                continue
            try:
                header = read_header(self.folder / spec.file)
            except CheckpointError as error:
                problems.append(f"{spec.file} ({spec.name}): {str(error).removeprefix(f'{self.folder / spec.file}: ')}")
                continue
            info = _info(spec, header)
            scales = header.scales
            problems += spec.problems(
                info.shape, header.weight.dtype, info.scales_shape, None if scales is None else scales.dtype
            )
            headers[spec.name] = header
            infos.append(info)
        extra = sorted(names - {spec.file for spec in specs})
        problems += [
            f"{name}: expected {len(specs)} files up to {specs[-1].file}, found this one too" for name in extra
        ]
        if problems:
            head = f"{self.folder} does not hold the checkpoint of {config.name!r}, {len(problems)} problem(s):"
            raise CheckpointError("\n  ".join([head, *problems]), tuple(problems))
        self.tensors = tuple(infos)
        self._headers = headers
        self._by_name = {info.name: info for info in infos}

    @property
    def total_bytes(self) -> int:
        """The length of all files together."""
        return sum(info.nbytes for info in self.tensors)

    def header(self, name: str) -> PickleHeader:
        """Where in which file the arrays of a tensor lie."""
        if name not in self._headers:
            raise CheckpointError(f"{self.folder}: expected the name of a tensor, found {name!r}")
        return self._headers[name]

    def read(self, name: str) -> MappedTensor:
        """A fresh mapping of one tensor, in (in, out) layout. It goes, and its file is closed, with its arrays."""
        header = self.header(name)
        tensor = map_pickle(header.path)
        info = self._by_name[name]
        found = (tensor.weight.shape, tensor.weight.dtype.name, None if tensor.scales is None else tensor.scales.shape)
        if found != (info.shape, info.dtype, info.scales_shape):
            raise CheckpointError(f"{header.path}: expected {info.dtype} {info.shape} as when opened, found {found}")
        return tensor


def _tensor_folder(path: Path) -> Path:
    for folder in (path / "ckpt-0", path):
        if folder.is_dir() and (folder.name == "ckpt-0" or any(folder.glob("tensor*_000"))):
            return folder
    found = "no such folder" if not path.is_dir() else "neither"
    raise CheckpointError(f"{path}: expected a folder ckpt-0 in it, or files tensor00000_000 and on, found {found}")


def _info(spec: TensorSpec, header: PickleHeader) -> TensorInfo:
    scales = header.scales
    return TensorInfo(
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
