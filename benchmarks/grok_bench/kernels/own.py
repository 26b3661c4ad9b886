"""`@grok_bench.problem`: a problem of a plug-in's, of an op that grok_kernels need not have."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .case import BF16_ERROR, TURNS, Case, Plain, copies
from .problems import Problem, Value, family

Make = TypeVar("Make", bound=Callable[..., Sequence[Any]])


def problem(
    op: str,
    axes: Mapping[str, Sequence[Value]],
    *,
    reference: Callable[..., Any],
    operations: Callable[[Problem], float] = lambda p: 0.0,
    weights: Sequence[str] = (),
    tolerance: float = BF16_ERROR,
) -> Callable[[Make], Make]:
    """Decorator: `make(p, device)` returns random arguments of one call, in order; `p["rows"]` is an axis's value.

    `reference` takes these arguments, and its results are what is due: their values within `tolerance`, their shapes,
    dtypes and strides. The names of the arguments are those of its parameters. Contestants with `prepare` may read the
    arguments named in `weights` beforehand, the others only when they are timed: they are changed in place. The bytes
    of the problem are those of all tensors. ValueError for an op that has problems already.
    """
    details = "-".join(f"{axis}{{{axis}}}" for axis in axes)

    def add(make: Make) -> Make:
        def build(p: Problem, device: str, cold: int) -> Case:
            return case(lambda: make(p, device), reference, cold, operations(p), weights, tolerance)

        family(op, details, axes, modelled=False)(build)
        return make

    return add


def case(
    make: Callable[[], Sequence[Any]], reference: Callable[..., Any], cold: int, operations: float,
    weights: Sequence[str] = (), tolerance: float = BF16_ERROR, names: Sequence[str] = (),
) -> Case:  # fmt: skip
    """The data of a problem whose arguments `make` draws at random."""
    names = names or list(inspect.signature(reference).parameters)
    first = make()
    tensors = [x for x in (*first, *_several(reference(*first))) if isinstance(x, Tensor)]
    size = sum(x.nbytes for x in tensors)
    inputs = [Plain(tuple(args)) for args in (first, *(make() for _ in range(max(TURNS, copies(size, cold)) - 1)))]
    spare = [_other(x, y) for x, y in zip(first, make(), strict=True)]

    def renew(inputs: Plain) -> None:
        """Exchange the values of the first call's arguments with others, but for the weights."""
        for name, x, y in zip(names, inputs.args, spare, strict=False):
            if isinstance(x, Tensor) and name not in weights:
                kept = x.clone()
                x.copy_(y)
                y.copy_(kept)

    return Case(
        inputs=inputs,
        expected=lambda inputs: reference(*inputs.args),
        operations=operations,
        bytes=size,
        arithmetic="fp32" if all(x.dtype == torch.float32 for x in tensors if x.is_floating_point()) else "bf16",
        tolerance=tolerance,
        renew=renew,
        names=names,
        source=(reference.__code__.co_filename, reference.__name__),
        watched=lambda inputs: {n: x for n, x in zip(names, inputs.args, strict=False) if isinstance(x, Tensor)},
    )


def _other(x: Any, y: Any) -> Any:
    """`y`, turned round if it is as `x`: what is read from a file is not drawn anew."""
    if isinstance(x, Tensor) and x.is_floating_point() and torch.equal(x.float(), y.float()):
        y.copy_(x.float().flip(tuple(range(x.dim()))))
    return y


def _several(result: Any) -> Sequence[Any]:
    return result if isinstance(result, (tuple, list)) else (result,)
