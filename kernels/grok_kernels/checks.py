"""Checks of an op's arguments, by unification of named dimensions; done once, at the op's boundary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import packing

FLOATS = (torch.float32, torch.bfloat16)
WEIGHTS = (torch.int8, torch.float8_e4m3fn, torch.bfloat16, torch.float32)
SCALED = (torch.int8, torch.float8_e4m3fn)
INT = (torch.int32,)
FP32 = (torch.float32,)
GROUP = 128  # columns that share a scale where activations are quantised in groups


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Checker:
    """Checks one call of one op: `tensor("x", x_TD, "T D", FLOATS)` binds T and D, or compares with what is bound.

    A name is a dimension shared by every argument that has it; a number is that size.
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
        if not isinstance(value, Tensor):  # the dispatcher lets None pass as a tensor
            self.fail(f"{name} is {value}, expected a tensor ({', '.join(dims.split())})")
        if value.dtype not in dtypes:
            self.fail(f"{name} has dtype {_name(value.dtype)}, expected {' or '.join(map(_name, dtypes))}")
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
            if symbol.isdigit():
                if size != int(symbol):
                    self.fail(f"{name} has shape {shape}, expected ({', '.join(names)})")
            elif symbol not in self.dims:
                self.dims[symbol] = (size, name)
            elif size != self.dims[symbol][0]:
                known, where = self.dims[symbol]
                self.fail(f"{name} has shape {shape}, expected ({', '.join(names)}) with {symbol}={known} from {where}")

    def same_device(self, name: str, value: Tensor) -> None:
        if self.device is None:
            self.device = (value.device, name)
        elif value.device != self.device[0]:
            self.fail(f"{name} is on {value.device}, expected {self.device[0]} as {self.device[1]}")

    def _packed(self, name: str, value: Tensor, dims: str) -> None:
        """A weight in its packed form, bound as the matrices that it holds."""
        if value.dtype not in packing.DTYPES:
            self.fail(f"{name} is packed, of {_name(value.dtype)}, expected {' or '.join(map(_name, packing.DTYPES))}")
        plain = packing.plain_shape(value)
        if tuple(value.shape) != packing.packed_shape(*plain, value.dtype) or not value.is_contiguous():
            self.fail(f"{name} has shape {tuple(value.shape)} and is neither ({dims}) nor what pack_weight returns")
        self.sizes(name, plain, dims.split())
        self.same_device(name, value)

    def same_dtype(self, name: str, value: Tensor, other: str, as_value: Tensor) -> None:
        if value.dtype != as_value.dtype:
            self.fail(f"{name} has dtype {_name(value.dtype)}, expected {_name(as_value.dtype)} as {other}")

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

    def weight(self, name: str, value: Tensor, dims: str, scale_name: str, scale: Tensor | None, k: str) -> None:
        """A weight (E, N, K), or packed, with its scales (E, groups, N): required for 8-bit types, refused for others."""
        if isinstance(value, Tensor) and packing.is_packed(value):
            self._packed(name, value, dims)
        else:
            self.tensor(name, value, dims, WEIGHTS)
        if value.dtype not in SCALED:
            if scale is not None:
                self.fail(f"{scale_name} is given, expected None for {name} of {_name(value.dtype)}")
            return
        if scale is None:
            raise self.error(f"{scale_name} is None, expected scales (E, groups, N) for {name} of {_name(value.dtype)}")
        experts, n, _ = dims.split()
        groups = f"groups_of_{scale_name}"
        self.tensor(scale_name, scale, f"{experts} {groups} {n}", FP32)
        count = self.size(groups)
        if count < 1 or self.size(k) % count:
            self.fail(f"{scale_name} has {count} groups, expected a divisor of {k}={self.size(k)}")
        if value.dtype == torch.float8_e4m3fn and count != 1:
            self.fail(f"{scale_name} has {count} groups, expected 1 for {name} of float8_e4m3fn")
