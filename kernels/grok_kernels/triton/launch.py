"""The one way by which this package starts a kernel, so that launches can be recorded and compiled for other chips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from triton import knobs

from . import interpreter

if knobs.runtime.interpret:
    interpreter.correct()


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
