"""Reads the data of a tensor in pieces and counts what no model should contain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from grok_engine.checkpoint.base import Checkpoint, CheckpointError, TensorInfo
from grok_engine.checkpoint.xai.pickle_machine import ArrayPlace
from grok_engine.checkpoint.xai.pickles import Array

CHUNK = 1 << 24
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # of bf16 too: it has the exponents of fp32
_COUNTS = {"nan": "NaN", "inf": "infinite", "zero": "zero", "negative": "negative", "denormal": "denormal"}


@dataclass(frozen=True, slots=True)
class Stats:
    """`minimum` and `maximum` are those of the finite values, None where there are none."""

    minimum: float | None = None
    maximum: float | None = None
    nan: int = 0
    inf: int = 0
    zero: int = 0
    negative: int = 0
    denormal: int = 0

    def __add__(self, other: Stats) -> Stats:
        lows = [x for x in (self.minimum, other.minimum) if x is not None]
        highs = [x for x in (self.maximum, other.maximum) if x is not None]
        counts = (getattr(self, name) + getattr(other, name) for name in _COUNTS)
        return Stats(min(lows, default=None), max(highs, default=None), *counts)

    def weight_problems(self) -> Iterator[str]:
        return self._problems("finite weights", ("nan", "inf"))

    def scale_problems(self) -> Iterator[str]:
        return self._problems("positive, normal, finite scales", tuple(_COUNTS))

    def _problems(self, expected: str, names: tuple[str, ...]) -> Iterator[str]:
        for name in names:
            if count := getattr(self, name):
                yield f"expected {expected}, found {count} {_COUNTS[name]}"


def scan(path: Path, place: ArrayPlace, read: Callable[[int], None]) -> Stats:
    """The statistics of one array. Holds a few chunks at a time, and calls `read` with the bytes of each."""
    stats, buffer = Stats(), np.empty(min(place.nbytes, CHUNK), np.uint8)
    try:
        with path.open("rb") as file:
            file.seek(place.offset)
            for start in range(0, place.nbytes, CHUNK):
                part = buffer[: place.nbytes - start]
                if (count := file.readinto(part.data)) < len(part):
                    raise CheckpointError(f"{path}: expected {len(part) - count} more bytes, found the end of the file")
                stats += _stats(part.view(place.dtype))
                read(len(part))
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
    return stats


def read_stats(checkpoint: Checkpoint, info: TensorInfo) -> tuple[Stats, Stats | None]:
    """The statistics of a tensor's values, and of its scales where it has any. Reads one matrix at a time."""
    weight, scales = Stats(), Stats() if info.block else None
    for expert in range(info.shape[0]) if len(info.shape) == 3 else [None]:
        values, *others = checkpoint.read(info.name, expert=expert)
        weight += _stats((values if values.dtype == torch.int8 else values.float()).numpy())
        if scales is not None:
            scales += _stats(others[0].float().numpy())
    return weight, scales


def _stats(values: Array) -> Stats:
    if values.dtype == np.int8:
        return Stats(float(values.min()), float(values.max()))
    # ml_dtypes has no fast reductions; widening bf16 by hand costs one shift.
    x = values if values.dtype == np.float32 else (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    nan, negative = int(np.count_nonzero(np.isnan(x))), int(np.count_nonzero(x < 0))
    finite = np.isfinite(x)
    inf = int(x.size - np.count_nonzero(finite)) - nan
    if nan or inf:
        x = x[finite]
    if not x.size:
        return Stats(nan=nan, inf=inf, negative=negative)
    zero = int(x.size - np.count_nonzero(x))
    denormal = int(np.count_nonzero(np.abs(x) < _SMALLEST_NORMAL)) - zero
    return Stats(float(x.min()), float(x.max()), nan, inf, zero, negative, denormal)
