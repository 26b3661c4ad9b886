"""A problem with its data, and how a result is compared with the truth."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Relative: of bf16 results, and of rows in 8 bits with a scale for each row or group, and with one for all rows.
BF16_ERROR, EIGHT_BIT_ERROR, ONE_SCALE_ERROR = 0.01, 0.1, 0.15
TURNS, MOST_TURNS = 4, 4096  # calls with inputs of their own, then the first again


def copies(size: float, cold: int, most: int = MOST_TURNS) -> int:
    """So many, of `size` bytes each, that who takes them in turns finds none in a cache: they exceed `cold` bytes."""
    return min(most, max(1, -(-cold // max(1, int(size)))))


class Inputs(Protocol):
    """Of one call. `args` are those of the op in `grok_kernels`, in the order of its contract."""

    @property
    def args(self) -> tuple[Any, ...]: ...


@dataclass(frozen=True)
class Plain:
    """Inputs of which nobody needs more than the arguments."""

    args: tuple[Any, ...]


def as_is(result: Any, inputs: Any) -> Any:
    return result


@dataclass(kw_only=True)
class Case:
    """`operations` and `bytes` are what the problem needs, whoever computes it."""

    inputs: Sequence[Any]  # of successive calls
    expected: Callable[[Any], Any]  # of one of them: what its result should be, in fp32
    operations: float
    bytes: float
    arithmetic: str  # whose ceiling holds where the bytes are few: fp32, bf16, fp8 or int8
    tolerance: float = BF16_ERROR
    weights: float = 0.0  # values of weights, or of keys and values, among the bytes
    weight_bytes: float = 0.0  # of one of them
    stored: float = 0.0  # such values in memory, hit or not
    shown: Callable[[Any, Any], Any] = as_is  # of a result and its inputs: what is compared
    reset: Callable[[Any], None] = lambda inputs: None  # before a result is checked

    def bytes_of(self, weight_bytes: float | None) -> float:
        """What someone reads whose weights have so many bytes each; None: as the problem has them."""
        return self.bytes if weight_bytes is None else self.bytes + self.weights * (weight_bytes - self.weight_bytes)


def error(got: Any, expected: Any) -> float:
    """|got - expected| / |expected| over all elements; of whole numbers the share that differs; of several the largest.

    Infinite where a NaN or an inf is not expected, or the shape is another.
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
    """Random data that depend on the problem, and not on what ran before."""
    torch.manual_seed(zlib.crc32(name.encode()))
