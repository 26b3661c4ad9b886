"""What a checkpoint holds, from its headers alone, and on request whether its numbers are sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grok_engine.checkpoint.base import Checkpoint, CheckpointError, TensorInfo
from grok_engine.checkpoint.open import open_checkpoint
from grok_engine.checkpoint.packed import is_packed_folder
from grok_engine.checkpoint.widened import WidenedCheckpoint
from grok_engine.checkpoint.xai.reader import XaiCheckpoint, XaiFile
from grok_engine.config import ModelConfig
from grok_engine.loading.build import memory_bits
from grok_engine.loading.resolve import read_config
from grok_kernels.dtypes import dtype_name
from grok_kernels.formats import FORMATS

from .verify import Stats, read_stats, scan

Progress = Callable[[int, int], None]
# By the end of a tensor's name, the first that fits.
_KINDS = {
    "embed": "embedding", ".q": "attention", ".k": "attention", ".v": "attention", ".o": "attention",
    ".moe.gate": "experts", ".moe.up": "experts", ".moe.down": "experts", ".router": "router", "lm_head": "head",
    ".mlp.gate": "feed-forward", ".mlp.up": "feed-forward", ".mlp.down": "feed-forward", "": "norms",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """One tensor. dtype: as it is stored, by the format's own name. groups: along K, by what shares a scale;
    `scale_layout` says it in words. index, scales_shape, scales_dtype: of the release's files. `weight` and `scales`
    are there only after verification.
    """

    name: str
    file: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    memory_bits: float  # of a weight on a CPU, scales included, with the default options
    groups: str = ""
    scale_layout: str | None = None
    scales_shape: tuple[int, ...] | None = None
    scales_dtype: str | None = None
    index: int | None = None
    weight: Stats | None = None
    scales: Stats | None = None

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {**values, "bytes": values.pop("nbytes")}


@dataclass(frozen=True, slots=True)
class Report:
    """The findings. Bytes by kind sum to `total_bytes`, those by dtype to the same without "file headers", which only
    the release counts. files: how many, where each holds one tensor."""

    path: str
    files: int | None
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
            "files": self.files,
            "total_bytes": self.total_bytes,
            "bytes_by_kind": self.bytes_by_kind,
            "bytes_by_dtype": self.bytes_by_dtype,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
        }


def inspect_checkpoint(path: str | Path, *, verify: bool = False, progress: Progress | None = None) -> Report:
    """Open the checkpoint at `path` and describe it. Without `verify` no weight is read.

    With `verify` all of it is, in pieces, and NaN, infinity and scales out of range become `problems`; `progress` is
    called with the bytes read so far and in total. A checkpoint that does not hold the model of its configuration
    raises CheckpointError, as it does when opened for use.
    """
    path = Path(path).absolute()
    if is_packed_folder(path):
        raise CheckpointError(
            f"{path} holds converted weights, which are not inspected: expected the checkpoint that they were made from"
        )
    config = read_config(path)
    checkpoint = open_checkpoint(path, config)
    bits = memory_bits(config, checkpoint)
    kinds, dtypes = dict.fromkeys([*_KINDS.values(), "scales", "file headers"], 0), Counter[str]()
    if isinstance(checkpoint, XaiCheckpoint):
        tensors = [_of_release(file, bits[file.spec.name]) for file in checkpoint.files.values()]
        for file in checkpoint.files.values():
            _count_release(file, kinds, dtypes)
    else:
        tensors = [_of(info, path, bits[info.name]) for info in checkpoint.tensors.values()]
        for tensor in tensors:
            kinds[tensor.kind] += tensor.nbytes
            dtypes[tensor.dtype] += tensor.nbytes
    problems: list[str] = []
    if verify:
        tensors = list(_verified(checkpoint, tensors, dtypes.total(), progress, problems))
    return Report(
        path=str(path),
        files=len(tensors) if isinstance(checkpoint, XaiCheckpoint) else None,
        config=config,
        total_bytes=sum(tensor.nbytes for tensor in tensors),
        bytes_by_kind=kinds,
        bytes_by_dtype=dict(dtypes.most_common()),
        tensors=tuple(tensors),
        verified=verify,
        problems=tuple(problems),
    )


def _kind(name: str) -> str:
    return next(kind for end, kind in _KINDS.items() if name.endswith(end))


def _of(info: TensorInfo, path: Path, bits: float) -> TensorReport:
    groups, layout = "", None
    if info.block is not None:
        (n, k), (rows, columns) = info.shape[-2:], (info.block[0], info.sub or info.block[1])
        groups = f"{-(-k // columns)} × {columns}" if rows == 1 else f"{rows} × {columns} blocks"
        layout = f"a scale for each {'row' if rows == 1 else f'{min(rows, n)} rows'} and {columns} columns"
    return TensorReport(
        name=info.name,
        file=path.name,
        kind=_kind(info.name),
        shape=info.shape,
        dtype=info.stored or dtype_name(FORMATS[info.format].dtype),
        nbytes=info.nbytes,
        memory_bits=bits,
        groups=groups,
        scale_layout=layout,
    )


def _of_release(file: XaiFile, bits: float) -> TensorReport:
    spec, header = file.spec, file.header
    groups, layout = "", None
    if header.scales:
        rows = spec.shape[-2] // file.groups
        groups = f"{file.groups} × {rows} {header.scales.dtype.name}"
        layout = f"{file.groups} group{'s' if file.groups > 1 else ''} of {rows} input rows"
    return TensorReport(
        name=spec.name,
        file=spec.file,
        kind=spec.kind,
        shape=header.weight.shape,
        dtype=header.weight.dtype.name,
        nbytes=header.file_size,
        memory_bits=bits,
        groups=groups,
        scale_layout=layout,
        scales_shape=header.scales.shape if header.scales else None,
        scales_dtype=header.scales.dtype.name if header.scales else None,
        index=spec.index,
    )


def _count_release(file: XaiFile, kinds: dict[str, int], dtypes: Counter[str]) -> None:
    header = file.header
    kinds["file headers"] += header.file_size
    for kind, array in ((_kind(file.spec.name), header.weight), ("scales", header.scales)):
        if array is not None:
            kinds[kind] += array.nbytes
            kinds["file headers"] -= array.nbytes
            dtypes[array.dtype.name] += array.nbytes


def _verified(
    checkpoint: Checkpoint, tensors: list[TensorReport], total: int, progress: Progress | None, problems: list[str]
) -> Iterator[TensorReport]:
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    widened = WidenedCheckpoint(checkpoint)
    for tensor in tensors:
        who, scales = tensor.name, None
        if isinstance(checkpoint, XaiCheckpoint):
            header, who = checkpoint.files[tensor.name].header, f"{tensor.file} ({tensor.name})"
            weight = scan(header.path, header.weight, read)
            scales = scan(header.path, header.scales, read) if header.scales else None
            found = [*weight.weight_problems(), *(scales.scale_problems() if scales else ())]
        else:
            weight, scales = read_stats(widened, widened.tensors[tensor.name])
            read(tensor.nbytes)
            found = [*weight.weight_problems(), *(scales.weight_problems() if scales else ())]  # may be negative or 0
        problems += [f"{who}: {problem}" for problem in found]
        yield replace(tensor, weight=weight, scales=scales)
