"""Reads the data of a tensor in pieces and counts what no model should contain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from grok_engine.checkpoint.xai.pickle_machine import ArrayPlace
from grok_engine.checkpoint.xai.pickles import Array, CheckpointError

CHUNK = 1 << 24
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)  # of bf16 too: it has the exponents of fp32


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
        return Stats(
            min(lows, default=None),
            max(highs, default=None),
            self.nan + other.nan,
            self.inf + other.inf,
            self.zero + other.zero,
            self.negative + other.negative,
            self.denormal + other.denormal,
        )

    def weight_problems(self) -> Iterator[str]:
        for count, what in ((self.nan, "NaN"), (self.inf, "infinite")):
            if count:
                yield f"expected finite weights, found {count} {what}"

    def scale_problems(self) -> Iterator[str]:
        counts = (
            (self.nan, "NaN"),
            (self.inf, "infinite"),
            (self.zero, "zero"),
            (self.negative, "negative"),
            (self.denormal, "denormal"),
        )
        for count, what in counts:
            if count:
                yield f"expected positive, normal, finite scales, found {count} {what}"


def scan(path: Path, place: ArrayPlace, read: Callable[[int], None]) -> Stats:
    """The statistics of one array. Holds a few chunks at a time, and calls `read` with the bytes of each."""
    stats = Stats()
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            left = place.nbytes
            buffer = np.empty(min(left, CHUNK), np.uint8)
            while left:
                part = buffer[: min(left, CHUNK)]
                _fill(path, file, part)
                stats = stats + _stats(part.view(place.dtype))
                left -= len(part)
                read(len(part))
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
    return stats


def _fill(path: Path, file: FileIO, part: Array) -> None:
    done = 0
    while done < len(part):
        count = file.readinto(part[done:].data)
        if not count:
            raise CheckpointError(f"{path}: expected {len(part) - done} more bytes, found the end of the file")
        done += count


def _stats(values: Array) -> Stats:
    if values.dtype == np.int8:
        return Stats(float(values.min()), float(values.max()))
    # ml_dtypes has no fast reductions; widening bf16 by hand costs one shift.
    x = values if values.dtype == np.float32 else (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(x)
    bad = int(x.size - np.count_nonzero(finite))
    nan = int(np.count_nonzero(np.isnan(x))) if bad else 0
    negative = int(np.count_nonzero(x < 0)) if bad else None
    if bad:
        x = x[finite]
    if not x.size:
        return Stats(nan=nan, inf=bad - nan, negative=negative or 0)
    low, high = float(x.min()), float(x.max())
    zero = int(x.size - np.count_nonzero(x))
    if negative is None:
        negative = int(np.count_nonzero(x < 0)) if low < 0 else 0
    denormal = int(np.count_nonzero(np.abs(x) < _SMALLEST_NORMAL)) - zero
    return Stats(low, high, nan, bad - nan, zero, negative, denormal)
