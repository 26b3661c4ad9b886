"""The one function that launches this package's kernels, so that launches can be recorded and compiled for other
chips."""

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
    """`triton.jit` of a kernel whose machine code must depend on the model alone, not on the batch.

    Triton specialises integers that are 1 or multiples of 16: as the batch changes it would compile anew, for
    seconds in the middle of serving, and perhaps with other bits. batch: the integers that depend on the batch.
    unaligned: the pointers to per-request or per-row numbers, which may be slices, and whose loads gain nothing from
    alignment.
    """
    return triton.jit(do_not_specialize=batch, do_not_specialize_on_alignment=unaligned)


@dataclass(frozen=True)
class Launch:
    """A recorded launch: kernel, grid, arguments, and compile-time values and options."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_recorded: ContextVar[list[Launch] | None] = ContextVar("grok_kernels_launches", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the current stream; an empty grid launches nothing."""
    meta = {"enable_fp_fusion": True, **meta}  # explicit, since Triton's default will change
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(Launch(kernel, grid, args, meta))
    elif all(grid):
        kernel[grid](*args, **meta)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block launches go to the list and do not run. Ops may be called with `meta` tensors, which take no
    memory."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
