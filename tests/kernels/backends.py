"""Every backend of the ops on this machine, for tests that hold each to the same: the cpu's with every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import grok_kernels
from grok_kernels import cpu


def _has_cpu(op: str) -> bool:
    return grok_kernels.backends()[op]["cpu"].available


BACKENDS = ("reference", *(f"cpu-{isa}" for isa in (cpu.isas() if _has_cpu("rms_norm") else ())))


@contextmanager
def serving(backend: str, *ops: str) -> Iterator[None]:
    """One of `BACKENDS` serves inside the block. An op of `ops` that the cpu does not have runs on the reference."""
    name, _, isa = backend.partition("-")
    with ExitStack() as stack:
        if isa:
            stack.enter_context(cpu.use_isa(isa))
        if not isa or all(map(_has_cpu, ops)):
            stack.enter_context(grok_kernels.use_backend(name))
        yield
