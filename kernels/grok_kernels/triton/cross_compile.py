"""Compiles the kernels for a chip that need not be there.

An op is called with tensors on `meta` under `launch.recording`, and each launch goes through Triton's own
specialisation and compiler, as it would on the chip. Under TRITON_INTERPRET=1 kernels are not compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ..chips import Chip, assume_chip
from .launch import Launch, recording


class _AbsentDriver:
    """As much of a driver as Triton needs to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target.arch)

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def target(chip: Chip) -> Iterator[None]:
    """Inside the block Triton compiles for this chip."""
    gpu = GPUTarget("cuda", chip.capability, 32) if chip.capability else GPUTarget("hip", chip.arch, 64)
    before, driver._active = driver._active, _AbsentDriver(gpu)
    try:
        yield
    finally:
        driver._active = before


def launches(call: Callable[[], Any], chip: Chip) -> list[Launch]:
    """What `call`, whose tensors are on `meta`, would launch on this chip."""
    with assume_chip(chip), recording() as found:
        call()
    return found


def compile_launch(launch: Launch, chip: Chip) -> Any:
    """Triton's compiled kernel of this launch, compiled into Triton's cache or found there."""
    with target(chip):
        return launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.meta)
