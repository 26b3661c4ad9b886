"""Every backend on this machine, for tests that all of them must pass: cpu with each instruction set, and Triton in its
interpreter. On a GPU (`on_device`): Triton, and the one that is selected there, which is cuda where it takes a call."""

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
    """Forces one of `BACKENDS` inside the block, or the reference if that backend lacks one of `ops`."""
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
