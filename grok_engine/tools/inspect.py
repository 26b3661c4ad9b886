"""What a checkpoint holds, from its headers alone; and, on request, whether its numbers are sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from grok_engine.checkpoint.packed import is_packed_folder
from grok_engine.checkpoint.xai.layout import Kind
from grok_engine.checkpoint.xai.reader import CheckpointError, TensorInfo, XaiCheckpoint
from grok_engine.config import ModelConfig

from .inspect_view import render
from .report import Report, TensorReport
from .verify import scan

__all__ = ["Report", "TensorReport", "inspect_checkpoint", "render"]

_KINDS: dict[Kind, str] = {
    "embedding": "embedding",
    "attention": "attention",
    "expert": "experts",
    "router": "router",
    "norm": "norms",
}


def inspect_checkpoint(
    path: str | Path, *, verify: bool = False, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Opens the checkpoint at `path` and describes it. Without `verify` no weight is read.

    With `verify` all of it is, in pieces, and NaN, infinity and scales out of range become `problems`; `progress` is
    called with the bytes read so far and in total. A checkpoint whose files do not fit its configuration raises
    CheckpointError, as it does when opened for use.
    """
    path = Path(path).absolute()
    if is_packed_folder(path):
        raise CheckpointError(f"{path} holds converted weights: expected the checkpoint that they were made from")
    checkpoint = XaiCheckpoint(path, ModelConfig.from_pretrained(path))
    tensors = tuple(TensorReport(info, _scale_layout(info)) for info in checkpoint.tensors)
    problems: list[str] = []
    if verify:
        tensors = tuple(_verified(checkpoint, tensors, problems, progress))
    kinds, dtypes = _bytes(checkpoint)
    return Report(
        path=str(path),
        config=checkpoint.config,
        parameters=checkpoint.config.param_count(),
        active_parameters=checkpoint.config.active_param_count(),
        total_bytes=checkpoint.total_bytes,
        bytes_by_kind=kinds,
        bytes_by_dtype=dtypes,
        tensors=tensors,
        verified=verify,
        problems=tuple(problems),
    )


def _scale_layout(info: TensorInfo) -> str | None:
    if not info.groups:
        return None
    return f"{info.groups} group{'s' if info.groups > 1 else ''} of {info.shape[-2] // info.groups} input rows"


def _bytes(checkpoint: XaiCheckpoint) -> tuple[dict[str, int], dict[str, int]]:
    kinds = dict.fromkeys([*_KINDS.values(), "scales", "file headers"], 0)
    dtypes: Counter[str] = Counter()
    for info in checkpoint.tensors:
        header = checkpoint.header(info.name)
        scales = header.scales.nbytes if header.scales else 0
        kinds[_KINDS[info.kind]] += header.weight.nbytes
        kinds["scales"] += scales
        kinds["file headers"] += info.nbytes - header.weight.nbytes - scales
        dtypes[info.dtype] += header.weight.nbytes
        if info.scales_dtype is not None:
            dtypes[info.scales_dtype] += scales
    return kinds, dict(dtypes.most_common())


def _verified(
    checkpoint: XaiCheckpoint,
    tensors: tuple[TensorReport, ...],
    problems: list[str],
    progress: Callable[[int, int], None] | None,
) -> list[TensorReport]:
    headers = [checkpoint.header(t.info.name) for t in tensors]
    total = sum(place.nbytes for h in headers for place in (h.weight, h.scales) if place is not None)
    done = 0

    def read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    verified = []
    for tensor, header in zip(tensors, headers, strict=True):
        who = f"{tensor.info.file} ({tensor.info.name})"
        weight = scan(header.path, header.weight, read)
        problems += [f"{who}: {problem}" for problem in weight.weight_problems()]
        scales = None
        if header.scales is not None:
            scales = scan(header.path, header.scales, read)
            problems += [f"{who}: {problem}" for problem in scales.scale_problems()]
        verified.append(TensorReport(tensor.info, tensor.scale_layout, weight, scales))
    return verified
