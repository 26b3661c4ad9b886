"""Every backend of the ops on this machine, for tests that hold each to the same: the cpu's with every instruction
set, and Triton's under its interpreter. On a GPU (`on_device`) Triton's, and what is selected there: the cuda
backend where it takes a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grok_kernels
from grok_kernels import cpu
from tests.kernels.on_device import ON_CPU


def _has(backend: str, op: str) -> bool:
    return grok_kernels.backends()[op][backend].available


ISAS = cpu.isas() if ON_CPU and _has("cpu", "rms_norm") else ()
SELECTED = "selected"
BACKENDS = (
    "reference",
    *(f"cpu-{isa}" for isa in ISAS),
    *(["triton"] if _has("triton", "rms_norm") else []),
    *([] if ON_CPU else [SELECTED]),
)


@contextmanager
def serving(backend: str, *ops: str) -> Iterator[None]:
    """One of `BACKENDS` serves inside the block. Where it lacks an op of `ops`, the reference serves."""
    name, _, isa = backend.partition("-")
    with ExitStack() as stack:
        if name == SELECTED:
            yield
            return
        if isa:
            stack.enter_context(cpu.use_isa(isa))
        served = all(_has(name, op) for op in ops)
        stack.enter_context(grok_kernels.use_backend(name if served else "reference"))
        yield
