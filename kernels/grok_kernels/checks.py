"""Checks of an op's arguments by unification of named dimensions, done once, at the op's boundary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dtypes import dtype_name

EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)  # quantised activations, which come with scales
INT = (torch.int32,)
FP32 = (torch.float32,)
GROUP = 128  # columns that share a scale where activations are quantised in groups


class Checker:
    """Checks one call of one op: `tensor("x", x_TD, "T D", FLOATS)` binds T and D, or compares them with what is bound.

    A name is a dimension, shared by every argument that has it.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.dims: dict[str, tuple[Any, str]] = {}
        self.device: tuple[torch.device, str] | None = None

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.op}: {message}")

    def fail(self, message: str) -> None:
        raise self.error(message)

    def tensor(self, name: str, value: Tensor, dims: str, dtypes: Sequence[torch.dtype]) -> None:
        """One tensor argument: dtype, number of dimensions, sizes, device, and a contiguous last dimension."""
        if not isinstance(value, Tensor):  # torch's dispatcher takes None for a tensor
            self.fail(f"{name} is {value}, expected a tensor ({', '.join(dims.split())})")
        if value.dtype not in dtypes:
            self.fail(f"{name} has dtype {dtype_name(value.dtype)}, expected {' or '.join(map(dtype_name, dtypes))}")
        names = dims.split()
        shape = tuple(value.shape)
        if len(shape) != len(names):
            self.fail(f"{name} has shape {shape}, expected {len(names)} dimensions ({', '.join(names)})")
        self.sizes(name, shape, names)
        self.same_device(name, value)
        if shape and value.stride(-1) != 1 and shape[-1] > 1 and value.numel():
            self.fail(f"{name} has strides {tuple(value.stride())}, expected its last dimension contiguous")

    def sizes(self, name: str, shape: tuple[int, ...], names: list[str]) -> None:
        for size, symbol in zip(shape, names, strict=True):
            if symbol not in self.dims:
                self.dims[symbol] = (size, name)
            elif size != self.dims[symbol][0]:
                known, where = self.dims[symbol]
                self.fail(f"{name} has shape {shape}, expected ({', '.join(names)}) with {symbol}={known} from {where}")

    def same_device(self, name: str, value: Tensor) -> None:
        if self.device is None:
            self.device = (value.device, name)
        elif value.device != self.device[0]:
            self.fail(f"{name} is on {value.device}, expected {self.device[0]} as {self.device[1]}")

    def same_dtype(self, name: str, value: Tensor, other: str, as_value: Tensor) -> None:
        if value.dtype != as_value.dtype:
            self.fail(f"{name} has dtype {dtype_name(value.dtype)}, expected {dtype_name(as_value.dtype)} as {other}")

    def size(self, symbol: str) -> Any:
        return self.dims[symbol][0]

    def finite(self, name: str, value: Any) -> None:
        if isinstance(value, float) and not math.isfinite(value):
            self.fail(f"{name}={value}, expected a finite number")

    def at_least(self, name: str, value: Any, low: float) -> None:
        self.finite(name, value)
        if value < low:
            self.fail(f"{name}={value}, expected {low} or more")

    def positive(self, name: str, value: Any) -> None:
        self.finite(name, value)
        if value <= 0:
            self.fail(f"{name}={value}, expected more than 0")

    def one_of(self, name: str, value: str, allowed: Sequence[str]) -> None:
        if value not in allowed:
            self.fail(f"{name}={value!r}, expected one of {', '.join(allowed)}")
