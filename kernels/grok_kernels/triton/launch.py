"""The one way by which this package starts a kernel, so that launches can be recorded and compiled for other chips."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import triton
from triton import knobs

from . import interpreter

if knobs.runtime.interpret:
    interpreter.correct()


def jit(*, batch: tuple[str, ...] = (), unaligned: tuple[str, ...] = ()) -> Callable[[Any], Any]:
    """`triton.jit` of a kernel whose machine code is to depend on the model alone, not on what a step holds.

    Triton compiles a kernel anew where an integer becomes 1 or a multiple of 16, or ceases to be: in the middle of
    serving, for seconds, and perhaps with other bits. batch: the integers that follow the batch. unaligned: the pointers
    to numbers of requests or rows, which may be slices, and whose loads gain nothing from an alignment of 16 bytes.
    """
    return triton.jit(do_not_specialize=batch, do_not_specialize_on_alignment=unaligned)


@dataclass(frozen=True)
class Launch:
    """A call that was recorded: a kernel, its grid, its arguments and its compile-time values, options among them."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("grok_kernels_launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta), on the current stream; an empty grid starts nothing."""
    meta = {"enable_fp_fusion": True, **meta}  # said, since Triton's default is about to change
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, meta))
    elif all(grid):
        kernel[grid](*args, **meta)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block nothing starts: the list gets every launch. Ops take tensors on `meta`, so that no memory is needed."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
