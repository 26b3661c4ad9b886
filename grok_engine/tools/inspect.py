"""What a checkpoint holds, from its headers alone, and on request whether its numbers are sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from grok_engine.checkpoint.base import CheckpointError, total_bytes
from grok_engine.checkpoint.packed import is_packed_folder
from grok_engine.checkpoint.xai.layout import Kind
from grok_engine.checkpoint.xai.reader import XaiCheckpoint, XaiFile
from grok_engine.config import ModelConfig
from grok_engine.loading.resolve import read_config

from .verify import Stats, scan

_KINDS: dict[Kind, str] = {kind: {"expert": "experts", "norm": "norms"}.get(kind, kind) for kind in get_args(Kind)}


@dataclass(frozen=True, slots=True)
class TensorReport:
    """One tensor. `weight` and `scales` are there only after verification."""

    file: XaiFile
    weight: Stats | None = None
    scales: Stats | None = None

    @property
    def scale_layout(self) -> str | None:
        if not (groups := self.file.groups):
            return None
        return f"{groups} group{'s' if groups > 1 else ''} of {self.file.spec.shape[-2] // groups} input rows"

    def to_dict(self) -> dict[str, Any]:
        spec, header = self.file.spec, self.file.header
        return {
            "name": spec.name,
            "index": spec.index,
            "file": spec.file,
            "kind": spec.kind,
            "shape": list(header.weight.shape),
            "dtype": header.weight.dtype.name,
            "scales_shape": list(header.scales.shape) if header.scales else None,
            "scales_dtype": header.scales.dtype.name if header.scales else None,
            "scale_layout": self.scale_layout,
            "bytes": header.file_size,
            "weight": asdict(self.weight) if self.weight else None,
            "scales": asdict(self.scales) if self.scales else None,
        }


@dataclass(frozen=True, slots=True)
class Report:
    """The findings. Bytes by kind sum to `total_bytes`, those by dtype to the same without the files' headers."""

    path: str
    config: ModelConfig
    total_bytes: int
    bytes_by_kind: dict[str, int]
    bytes_by_dtype: dict[str, int]
    tensors: tuple[TensorReport, ...]
    verified: bool
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Everything, in types that JSON has."""
        return {
            "path": self.path,
            "ok": self.ok,
            "verified": self.verified,
            "problems": list(self.problems),
            "architecture": self.config.to_dict() | {"eos_token_ids": list(self.config.eos_token_ids)},
            "parameters": self.config.param_count(),
            "active_parameters": self.config.active_param_count(),
            "files": len(self.tensors),
            "total_bytes": self.total_bytes,
            "bytes_by_kind": self.bytes_by_kind,
            "bytes_by_dtype": self.bytes_by_dtype,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }


def inspect_checkpoint(
    path: str | Path, *, verify: bool = False, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Open the checkpoint at `path` and describe it. Without `verify` no weight is read.

    With `verify` all of it is, in pieces, and NaN, infinity and scales out of range become `problems`; `progress` is
    called with the bytes read so far and in total. A checkpoint whose files do not fit its configuration raises
    CheckpointError, as it does when opened for use.
    """
    path = Path(path).absolute()
    if is_packed_folder(path):
        raise CheckpointError(f"{path} holds converted weights: expected the checkpoint that they were made from")
    checkpoint = XaiCheckpoint(path, read_config(path))
    files = tuple(checkpoint.files.values())
    kinds, dtypes = dict.fromkeys([*_KINDS.values(), "scales", "file headers"], 0), Counter[str]()
    for file in files:
        header = file.header
        kinds["file headers"] += header.file_size
        for kind, array in ((_KINDS[file.spec.kind], header.weight), ("scales", header.scales)):
            if array is not None:
                kinds[kind] += array.nbytes
                kinds["file headers"] -= array.nbytes
                dtypes[array.dtype.name] += array.nbytes
    tensors = tuple(_verified(files, dtypes.total(), progress) if verify else map(TensorReport, files))
    return Report(
        path=str(path),
        config=checkpoint.config,
        total_bytes=total_bytes(checkpoint),
        bytes_by_kind=kinds,
        bytes_by_dtype=dict(dtypes.most_common()),
        tensors=tensors,
        verified=verify,
        problems=tuple(problem for tensor in tensors for problem in _problems(tensor)),
    )


def _verified(
    files: tuple[XaiFile, ...], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[TensorReport]:
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for file in files:
        header = file.header
        weight = scan(header.path, header.weight, read)
        yield TensorReport(file, weight, scan(header.path, header.scales, read) if header.scales else None)


def _problems(tensor: TensorReport) -> Iterator[str]:
    who = f"{tensor.file.spec.file} ({tensor.file.spec.name})"
    if tensor.weight:
        yield from (f"{who}: {problem}" for problem in tensor.weight.weight_problems())
    if tensor.scales:
        yield from (f"{who}: {problem}" for problem in tensor.scales.scale_problems())
