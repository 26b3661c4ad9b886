"""Where the problems run: the clock, the cold caches, the memory and the ceilings of a CPU or of a GPU."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..environment import available_bytes
from ..schema import Ceiling as Kept
from ..schema import GpuState
from . import ours
from .monitor import Monitor

SETTLE = 1.5  # seconds to see each ceiling once without whatever else runs
PROBE_BYTES, PROBE_STEPS = 128 << 20, 1_000_000  # of a CPU: each some milliseconds
MEMORY = ("read", "copy")  # the ceilings in bytes


class Ceiling:
    """`rate()` measures: bytes a second for MEMORY, operations a second for a kind of arithmetic."""

    def __init__(self, name: str, measure: Callable[[], float]) -> None:
        self.name = name
        self.usual = 0.0  # the upper quartile of what was measured: what a machine does that is left alone
        self._measure = measure
        self._rates: list[float] = []

    def rate(self) -> float:
        rate = self._measure()
        insort(self._rates, rate)
        self.usual = self._rates[len(self._rates) * 3 // 4]
        return rate

    def settle(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        self.rate()
        while time.perf_counter() < end:
            self.rate()


class Device:
    """A CPU. `small` is for tests: probes of no size, whose rates mean nothing. Without `probed` it has no ceilings."""

    kind = "cpu"

    def __init__(self, name: str = "cpu", small: bool = False, probed: bool = True) -> None:
        self.name = name
        self.small = small
        self._scratch = self._new_scratch()
        self.ceilings: dict[str, Ceiling] = {}
        for what, measure in self._probes().items() if probed else ():
            try:
                measure()
            except (RuntimeError, ValueError, NotImplementedError):
                continue  # a type that this chip or this torch does not multiply
            self.ceilings[what] = Ceiling(what, measure)
            self.ceilings[what].settle(0.0 if small else SETTLE)

    def state(self, began: float, ended: float) -> GpuState | None:
        """What a GPU's power and clock were between these times of `time.perf_counter()`."""
        return None

    def binding(self, operations: float, size: float, arithmetic: str) -> tuple[Ceiling, float]:
        """The ceiling that takes longer for so many operations and bytes, and the work in its unit."""
        memory = next(self.ceilings[name] for name in MEMORY if name in self.ceilings)
        peak = self.ceilings.get(arithmetic) or self.ceilings["bf16"]  # a CPU multiplies fp8 as bf16
        return (memory, size) if size / memory.usual > operations / peak.usual else (peak, operations)

    def kept(self) -> dict[str, Kept]:
        """The ceilings as a result file has them."""
        return {
            name: Kept(unit="B/s" if name in MEMORY else "FLOP/s", rate=ceiling.usual)
            for name, ceiling in self.ceilings.items()
        }

    def free(self) -> int | None:
        return available_bytes(self.name)

    # what a GPU does otherwise

    def seconds(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    @property
    def cold(self) -> int:
        """Bytes that calls have to go through before they take the same data again, to find none of it in a cache."""
        return 0 if self.small else 4 * last_cache_bytes()

    def flush(self) -> None:
        """Before each call, where that is how caches get cold. Not on a CPU: its instructions would be cold, too."""

    def ready(self, call: Callable[[], Any], graph: bool = True) -> Callable[[], Any]:
        """What to call in place of `call`, which was called before."""
        return call

    def synchronize(self) -> None:
        """Wait for what is under way."""

    def recover(self) -> None:
        """After a contestant that failed."""

    def _new_scratch(self) -> Tensor:
        size = 1 << 16 if self.small else 4 * last_cache_bytes()
        return ours.memory(size)

    def _probes(self) -> dict[str, Callable[[], float]]:
        if ours.probes() is None:
            return {"copy": self._copy(PROBE_BYTES), **{k: self._product(k, 1024) for k in ("bf16", "fp32", "int8")}}
        steps = 100 if self.small else PROBE_STEPS
        probes: dict[str, Callable[[], float]] = {"read": self._read()}
        for kind in ("fp32", "bf16", "int8"):
            probes[kind] = partial(self._rate, partial(ours.probes().probe_peak, kind, steps))
        return probes

    def _read(self) -> Callable[[], float]:
        """Each time another part of the buffer that no cache holds."""
        size = min(len(self._scratch) // 2, PROBE_BYTES)
        parts = self._scratch[: len(self._scratch) // size * size].view(-1, size)
        turn = 0

        def read() -> int:
            nonlocal turn
            turn += 1
            ours.probes().probe_read(parts[turn % len(parts)])
            return size

        return partial(self._rate, read)

    def _rate(self, work: Callable[[], int]) -> float:
        done = 0

        def call() -> None:
            nonlocal done
            done = work()

        seconds = self.seconds(call)
        return done / seconds

    def _copy(self, size: int) -> Callable[[], float]:
        """Bytes read and written by a large copy."""
        source = torch.zeros(1 << 16 if self.small else size, dtype=torch.int8, device=self.name)
        target = torch.empty_like(source)
        return lambda: 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def _product(self, kind: str, n: int) -> Callable[[], float]:
        """Operations of a large product of square matrices."""
        n = 64 if self.small else n

        def multiplied() -> Callable[[], Any]:  # of random values: a chip is slower with those than with zeros
            x = torch.randn(n, n, device=self.name)
            if kind == "fp8":
                q, one = x.to(torch.float8_e4m3fn), torch.ones((), device=self.name)
                return lambda: torch._scaled_mm(q, q.t(), one, one, out_dtype=torch.bfloat16)
            if kind == "int8":
                i = (x * 40).clamp(-127, 127).to(torch.int8)
                return lambda: torch._int_mm(i, i.t())
            y = x.bfloat16() if kind == "bf16" else x
            return lambda: torch.mm(y, y.t())

        made: list[Callable[[], Any]] = []

        def measure() -> float:
            if not made:
                made.append(multiplied())
                made[0]()
            return 2.0 * n**3 / self.seconds(made[0])

        return measure


class Cuda(Device):
    """A GPU: events, graphs, and a write to more than the L2 cache before each call."""

    kind = "cuda"
    cold = 0

    def __init__(self, name: str, small: bool = False, probed: bool = True) -> None:
        self._monitor: Monitor | None = None
        if probed and not small:
            p: Any = torch.cuda.get_device_properties(name)
            bus_id = f"{p.pci_domain_id:08x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
            with suppress(OSError):  # figures without these are figures still
                self._monitor = Monitor(bus_id)
        super().__init__(name, small, probed)

    def state(self, began: float, ended: float) -> GpuState | None:
        return self._monitor.between(began, ended) if self._monitor else None

    def seconds(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3

    def flush(self) -> None:
        # while this runs the host gets ahead, and the call's launch is not in its time
        self._scratch.zero_()

    def ready(self, call: Callable[[], Any], graph: bool = True) -> Callable[[], Any]:
        """A replay of the call captured in a CUDA graph; the call itself where it cannot be captured."""
        if not graph:
            return call
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                call()
        except RuntimeError:
            self.recover()
            return call
        return captured.replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def recover(self) -> None:
        torch.cuda.empty_cache()
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise NotImplementedError(
                f"{self.name} is lost to this process ({error}): run with --subprocess"
            ) from error

    def _new_scratch(self) -> Tensor:
        cache = torch.cuda.get_device_properties(self.name).L2_cache_size
        return torch.empty(1 << 16 if self.small else max(4 * cache, 256 << 20), dtype=torch.int8, device=self.name)

    def _probes(self) -> dict[str, Callable[[], float]]:
        return {"copy": self._copy(1 << 30), **{k: self._product(k, 8192) for k in ("bf16", "fp8", "int8", "fp32")}}


def known(name: str) -> str:
    """A device's full name. ValueError, with those that there are, for one that is not there."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    found = "cuda:0" if name == "cuda" else name
    if found not in there:
        raise ValueError(f"there is no device {name!r} here: expected one of {', '.join(there)}")
    return found


def device(name: str, small: bool = False, probed: bool = True) -> Device:
    """By torch's name, as `known`."""
    found = known(name)
    if found == "cpu":
        return Device(found, small, probed)
    torch.cuda.set_device(found)
    return Cuda(found, small, probed)


def last_cache_bytes() -> int:
    """Of the largest cache that a core sees; 32 MiB where the system does not tell."""
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in ("K", "M")
    ]
    return max(sizes, default=32 << 20)
