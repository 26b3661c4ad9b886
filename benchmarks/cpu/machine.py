"""This machine: what it is, and its ceilings, measured by native probes on the threads that the kernels run on."""

from __future__ import annotations

import time
from bisect import insort
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import grok_kernels

ARITHMETIC = ("fp32", "bf16", "int8")
SETTLE = 1.5  # seconds to see each ceiling once without whatever else runs
PROBE_BYTES, PROBE_STEPS = 128 << 20, 1_000_000  # each some milliseconds


def _native() -> Any:
    status = grok_kernels.backends()["rms_norm"]["cpu"]
    if not status.available:
        raise NotImplementedError(f"the probes are native code: {status.reason}")
    from grok_kernels import _C

    return _C


class Ceiling:
    """`rate()` measures: bytes a second for `read`, operations a second for a kind of arithmetic."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.usual = 0.0  # the upper quartile of what was measured: what a machine does that is left alone
        self._rates: list[float] = []

    def rate(self) -> float:
        start = time.perf_counter()
        work = self._probe()
        rate = work / (time.perf_counter() - start)
        insort(self._rates, rate)
        self.usual = self._rates[len(self._rates) * 3 // 4]
        return rate

    def _probe(self) -> int:
        """Does some work, and says how much."""
        raise NotImplementedError


class Read(Ceiling):
    """Reads from memory: each time another part of a buffer that no cache holds."""

    def __init__(self, cache_bytes: int, probe_bytes: int) -> None:
        super().__init__("read")
        self._parts = max(2, -(-4 * cache_bytes // probe_bytes))
        self._size = probe_bytes
        self._buffer = grok_kernels.weight_memory((self._parts * probe_bytes,), torch.int8, "cpu").random_(-128, 128)
        self._next = 0
        self._read = _native().probe_read

    def _probe(self) -> int:
        part = self._buffer[self._next * self._size : (self._next + 1) * self._size]
        self._next = (self._next + 1) % self._parts
        self._read(part)
        return self._size


class Arithmetic(Ceiling):
    def __init__(self, kind: str, steps: int) -> None:
        super().__init__(kind)
        self._steps = steps
        self._peak = _native().probe_peak

    def _probe(self) -> int:
        return int(self._peak(self.name, self._steps))


@dataclass
class Machine:
    """The ceilings of this process's threads. `small` is for tests: probes of no size, whose rates mean nothing."""

    small: bool = False
    cache_bytes: int = field(init=False)
    ceilings: dict[str, Ceiling] = field(init=False)
    rates: dict[str, float] = field(init=False)  # at the start
    instructions: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.cache_bytes = 1 << 16 if self.small else last_cache_bytes()
        size, steps = (1 << 16, 100) if self.small else (PROBE_BYTES, PROBE_STEPS)
        self.ceilings = {"read": Read(self.cache_bytes, size)}
        self.ceilings |= {kind: Arithmetic(kind, steps) for kind in ARITHMETIC}
        self.rates = {name: _settle(ceiling, 0.0 if self.small else SETTLE) for name, ceiling in self.ceilings.items()}
        self.instructions = {kind: str(_native().probe_instruction(kind)) for kind in ARITHMETIC}

    def binding(self, operations: float, size: float, arithmetic: str) -> tuple[Ceiling, float]:
        """The ceiling that takes longer for so many operations and bytes, and the work in its unit."""
        read, peak = self.ceilings["read"], self.ceilings[arithmetic]
        return (read, size) if size / read.usual > operations / peak.usual else (peak, operations)


def _settle(ceiling: Ceiling, seconds: float) -> float:
    end = time.perf_counter() + seconds
    ceiling.rate()
    while time.perf_counter() < end:
        ceiling.rate()
    return ceiling.usual


def last_cache_bytes() -> int:
    """Of the largest cache that a core sees; 32 MiB where the system does not tell."""
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in ("K", "M")
    ]
    return max(sizes, default=32 << 20)
