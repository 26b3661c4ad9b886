"""A problem with its data, and how a result is compared with what is due."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Relative errors allowed: results in bf16, rows in 8 bits with a scale for each row or group.
BF16_ERROR, EIGHT_BIT_ERROR = 0.01, 0.1
TURNS, MOST_TURNS = 4, 4096  # calls with inputs of their own before the first inputs are used again
COPIED = 64 << 20  # bytes of an input up to which it is copied, to see whether a call changed it


def copies(size: float, cold: int, most: int = MOST_TURNS) -> int:
    """How many copies of `size` bytes exceed `cold`, so that taking them in turns finds none in a cache."""
    return min(most, max(1, -(-cold // max(1, int(size)))))


@dataclass(frozen=True)
class Plain:
    """One call's inputs: the arguments of the op in `grok_kernels`, in order, with weights as `Weights`."""

    args: tuple[Any, ...]


def flip(inputs: Any) -> None:
    """Change the rows, the first argument, in place, so that the result is another; a second time, change them back."""
    rows = inputs.args[0]
    rows.copy_(rows.flip(-1))


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
    shown: Callable[[Any, Any], Any] = lambda result, inputs: result  # maps a result and its inputs to what is compared
    reset: Callable[[Any], None] = lambda inputs: None  # clears what the call writes, before a result is checked
    due: Callable[[Any], Any] | None = None  # maps inputs to tensors of the results' shapes, dtypes and strides
    renew: Callable[[Any], None] = flip
    watched: Callable[[Any], Mapping[str, Tensor]] = lambda inputs: {}  # inputs, by name, that a call must not change
    names: Sequence[str] = ()  # of the arguments
    source: tuple[str, str] = ("", "")  # the file and the name of an own problem's reference
    changed: bool = False  # whether the first inputs are changed in place
    _truths: dict[Hashable, Any] = field(default_factory=dict)

    def bytes_of(self, weight_bytes: float | None) -> float:
        """Bytes read and written with weights of that size each; None: of the problem's size."""
        return self.bytes if weight_bytes is None else self.bytes + self.weights * (weight_bytes - self.weight_bytes)

    def change(self, changed: bool) -> None:
        """Have the first inputs changed in place, or as they were."""
        if changed != self.changed:
            self.renew(self.inputs[0])
            self.changed = changed

    def truth(self, instead: Callable[[Any], Any] | None = None) -> Any:
        """The right result of the first inputs as they are now, or of what `instead` maps them to; computed once."""
        key = (instead, self.changed)
        if key not in self._truths:
            self._truths[key] = self.expected(instead(self.inputs[0]) if instead else self.inputs[0])
        return self._truths[key]


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


def misfit(got: Any, due: Any) -> str:
    """Which shape, dtype or stride of a result is not the one that is due; empty if all are."""
    results, wanted = ([*x] if isinstance(x, (tuple, list)) else [x] for x in (got, due))
    if len(results) != len(wanted):
        return f"{len(results)} results, {len(wanted)} are due"
    for i, (a, b) in enumerate(zip(results, wanted, strict=True)):
        which = f" of result {i}" if len(wanted) > 1 else ""
        if not isinstance(a, Tensor):
            return f"the type{which} is {type(a).__name__}, Tensor is due"
        pairs = {
            "shape": (tuple(a.shape), tuple(b.shape)),
            "dtype": (a.dtype, b.dtype),
            "stride": (_stride(a), _stride(b)),
        }
        for what, (found, wants) in pairs.items():
            if found != wants:
                return f"the {what}{which} is {found}, {wants} is due"
    return ""


def _stride(x: Tensor) -> tuple[int, ...]:
    """Without dimensions of one element, whose stride means nothing."""
    return tuple(stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


class Watch:
    """A call's inputs as they were: copies of small ones, sums of the bytes of large ones."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self._inputs = inputs
        self._kept = {name: x.clone() if x.nbytes <= COPIED else _bytes(x).sum() for name, x in inputs.items()}

    def changed(self) -> list[str]:
        """The names of those that are not as they were; small ones are put back."""
        found = []
        for name, x in self._inputs.items():
            small, kept = x.nbytes <= COPIED, self._kept[name]
            if not torch.equal(_bytes(x) if small else _bytes(x).sum(), _bytes(kept) if small else kept):
                found.append(name)
                if small:
                    x.copy_(kept)
        return found


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def seed(name: str) -> None:
    """Seed torch by the problem's name: its data do not depend on what ran before."""
    torch.manual_seed(zlib.crc32(name.encode()))
