"""A problem with its data, and how a result is compared with the truth."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Relative errors allowed: results in bf16, rows in 8 bits with a scale for each row or group, one scale for all rows.
BF16_ERROR, EIGHT_BIT_ERROR, ONE_SCALE_ERROR = 0.01, 0.1, 0.15
TURNS, MOST_TURNS = 4, 4096  # calls with inputs of their own before the first inputs are used again


def copies(size: float, cold: int, most: int = MOST_TURNS) -> int:
    """How many copies of `size` bytes exceed `cold`, so that taking them in turns finds none in a cache."""
    return min(most, max(1, -(-cold // max(1, int(size)))))


@dataclass(frozen=True)
class Plain:
    """One call's inputs: the arguments of the op in `grok_kernels`, in order, with weights as `Weights`."""

    args: tuple[Any, ...]


def as_is(result: Any, inputs: Any) -> Any:
    return result


@dataclass(kw_only=True)
class Case:
    """A problem's data. `operations` and `bytes` are what it needs, whoever computes it."""

    inputs: Sequence[Any]  # of successive calls
    expected: Callable[[Any], Any]  # maps one of them to the right result, in fp32
    operations: float
    bytes: float
    arithmetic: str  # of the compute ceiling: fp32, bf16, fp8 or int8
    tolerance: float = BF16_ERROR
    weights: float = 0.0  # number of weights (or keys and values) that are read
    weight_bytes: float = 0.0  # bytes of each
    stored: float = 0.0  # number of them in memory, read or not
    shown: Callable[[Any, Any], Any] = as_is  # maps a result and its inputs to what is compared
    reset: Callable[[Any], None] = lambda inputs: None  # clears what the call writes, before a result is checked

    def bytes_of(self, weight_bytes: float | None) -> float:
        """Bytes read and written with weights of that size each; None: of the problem's size."""
        return self.bytes if weight_bytes is None else self.bytes + self.weights * (weight_bytes - self.weight_bytes)


def error(got: Any, expected: Any) -> float:
    """|got - expected| / |expected| over all elements; for integers the share that differs; the largest of several.

    Infinite for a NaN, an inf or another shape.
    """
    if isinstance(expected, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(expected):
            return float("inf")
        return max(error(g, e) for g, e in zip(got, expected, strict=True))
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return float("inf")
    if not expected.dtype.is_floating_point:
        return float((got.to(expected.dtype) != expected).double().mean()) if expected.numel() else 0.0
    got, expected = got.double(), expected.double()
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def seed(name: str) -> None:
    """Seed torch by the problem's name: its data do not depend on what ran before."""
    torch.manual_seed(zlib.crc32(name.encode()))
