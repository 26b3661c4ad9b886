"""Where the problems run: the clock, cold caches, free memory and ceilings of a CPU or a GPU."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grok_engine.runtime.memory import available_bytes

from ..schema import Ceiling as Kept
from ..schema import GpuState
from . import ours
from .monitor import Monitor

SETTLE = 1.5  # seconds of measuring each ceiling at the start, to see it once undisturbed
PROBE_BYTES, PROBE_STEPS = 128 << 20, 1_000_000  # of a CPU's probes: some milliseconds each
MEMORY = ("read", "copy")  # the ceilings in bytes


class Ceiling:
    """A best rate: bytes a second for MEMORY, operations a second for a kind of arithmetic. Measured for `seconds`."""

    def __init__(self, measure: Callable[[], float], seconds: float = 0.0) -> None:
        self.usual = 0.0  # the upper quartile of all measurements: the rate of an undisturbed machine
        self._measure = measure
        self._rates: list[float] = []
        end = time.perf_counter() + seconds
        self.rate()
        while time.perf_counter() < end:
            self.rate()

    def rate(self) -> float:
        """Measure it now."""
        rate = self._measure()
        insort(self._rates, rate)
        self.usual = self._rates[len(self._rates) * 3 // 4]
        return rate


class Device:
    """A CPU. `small` is for tests: tiny probes whose rates mean nothing. Without `probed` it has no ceilings."""

    kind = "cpu"

    def __init__(self, name: str = "cpu", small: bool = False, probed: bool = True) -> None:
        self.name, self.small = name, small
        self._scratch = self._new_scratch()
        self.ceilings: dict[str, Ceiling] = {}
        for what, measure in self._probes().items() if probed else ():
            with suppress(RuntimeError, ValueError):  # a type that this chip or this torch does not multiply
                self.ceilings[what] = Ceiling(measure, 0.0 if small else SETTLE)

    def binding(self, operations: float, size: float, arithmetic: str) -> tuple[Ceiling, float]:
        """The ceiling under which this work takes longest, and the work in its unit: bytes or operations."""
        memory = next(self.ceilings[name] for name in MEMORY if name in self.ceilings)
        peak = self.ceilings.get(arithmetic) or self.ceilings["bf16"]  # a CPU multiplies fp8 as bf16
        return (memory, size) if size / memory.usual > operations / peak.usual else (peak, operations)

    def kept(self) -> dict[str, Kept]:
        """The ceilings as a result file has them."""
        return {n: Kept(unit="B/s" if n in MEMORY else "FLOP/s", rate=c.usual) for n, c in self.ceilings.items()}

    def free(self) -> int | None:
        return available_bytes(self.name)

    # What follows a GPU does otherwise.

    @property
    def cold(self) -> int:
        """Bytes of other data that calls go through before they use the same again, so that no cache holds it."""
        return 0 if self.small else 4 * last_cache_bytes()

    def seconds(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def flush(self) -> None:
        """Evict the caches before a call. Not on a CPU, where that would evict the instructions, too: see `cold`."""

    def ready(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """What to time in place of `call`, which has run once."""
        return call

    def synchronize(self) -> None:
        """Wait for asynchronous work."""

    def recover(self) -> None:
        """Clean up after a contestant that failed."""

    def state(self, began: float, ended: float) -> GpuState | None:
        """A GPU's power and clock between two times of `time.perf_counter()`."""
        return None

    def _new_scratch(self) -> Tensor:
        return ours.memory(1 << 16 if self.small else 4 * last_cache_bytes())

    def _probes(self) -> dict[str, Callable[[], float]]:
        native = ours.probes()
        if native is None:
            return {"copy": self._copy(PROBE_BYTES), **{k: self._product(k, 1024) for k in ("bf16", "fp32", "int8")}}
        steps = 100 if self.small else PROBE_STEPS
        size = min(len(self._scratch) // 2, PROBE_BYTES)
        parts = cycle(self._scratch.split(size)[: len(self._scratch) // size])  # more than the caches hold

        def read() -> float:
            part = next(parts)
            return size / self.seconds(lambda: native.probe_read(part))

        def peak(kind: str) -> float:
            start = time.perf_counter()
            return float(native.probe_peak(kind, steps)) / (time.perf_counter() - start)

        return {"read": read, **{kind: partial(peak, kind) for kind in ("fp32", "bf16", "int8")}}

    def _copy(self, size: int) -> Callable[[], float]:
        """Bytes read and written by a large copy."""
        source = torch.zeros(1 << 16 if self.small else size, dtype=torch.int8, device=self.name)
        target = torch.empty_like(source)
        return lambda: 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def _product(self, kind: str, n: int) -> Callable[[], float]:
        """Operations of a large product of square matrices, made when it is first measured."""
        n = 64 if self.small else n
        product = cache(partial(_multiply, kind, n, self.name))
        return lambda: 2.0 * n**3 / self.seconds(product())


def _multiply(kind: str, n: int, device: str) -> Callable[[], Any]:
    """A product of random matrices: with zeros a chip draws less power and runs faster."""
    x = torch.randn(n, n, device=device)
    if kind == "fp8":
        q, one = x.to(torch.float8_e4m3fn), torch.ones((), device=device)
        return lambda: torch._scaled_mm(q, q.t(), one, one, out_dtype=torch.bfloat16)
    if kind == "int8":
        i = (x * 40).clamp(-127, 127).to(torch.int8)
        return lambda: torch._int_mm(i, i.t())
    y = x.bfloat16() if kind == "bf16" else x
    return lambda: torch.mm(y, y.t())


class Cuda(Device):
    """A GPU: timed by events, replayed from graphs, its L2 cache evicted before each call."""

    kind = "cuda"
    cold = 0

    def __init__(self, name: str, small: bool = False, probed: bool = True) -> None:
        self._monitor: Monitor | None = None
        if probed and not small:
            p: Any = torch.cuda.get_device_properties(name)
            bus_id = f"{p.pci_domain_id:08x}:{p.pci_bus_id:02x}:{p.pci_device_id:02x}.0"
            with suppress(OSError):  # times are valid without power and clock
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
        # while this runs the host gets ahead, so that the call's launch is not in its time
        self._scratch.zero_()

    def ready(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A replay of the call captured in a CUDA graph; the call itself where it cannot be captured."""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            torch.cuda.current_stream().wait_stream(side)
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                result = call()
        except RuntimeError:
            self.recover()
            return call

        def replay() -> Any:
            captured.replay()
            return result

        return replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def recover(self) -> None:
        torch.cuda.empty_cache()
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            lost = f"{self.name} is lost to this process ({error}): run with --subprocess"
            raise NotImplementedError(lost) from error

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
    """The device of that name, as `known` takes it; a GPU becomes torch's current one."""
    found = known(name)
    if found == "cpu":
        return Device(found, small, probed)
    torch.cuda.set_device(found)
    return Cuda(found, small, probed)


def last_cache_bytes() -> int:
    """Size of the largest cache that a core sees; 32 MiB where the system does not tell."""
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip())[-1:] in ("K", "M")
    ]
    return max(sizes, default=32 << 20)
