"""Power, clock and temperature of a GPU, sampled on a thread through the driver's own library (NVML)."""

from __future__ import annotations

import ctypes
import threading
import time
from statistics import median

from ..schema import GpuState

EVERY = 0.02  # seconds between readings
SM, CORE = 1, 0  # NVML's numbers of the multiprocessors' clock and of the temperature sensor
POWER_NOW = 186  # NVML_FI_DEV_POWER_INSTANT: nvmlDeviceGetPowerUsage is the mean of a second on Hopper
# nvmlClocksEventReasons: software power cap, hardware slowdown, software and hardware thermal, hardware power brake
HELD_BACK = 0x4 | 0x8 | 0x20 | 0x40 | 0x80


class _Value(ctypes.Structure):
    """nvmlFieldValue_t."""

    _fields_ = [
        ("field", ctypes.c_uint), ("scope", ctypes.c_uint), ("at", ctypes.c_longlong), ("latency", ctypes.c_longlong),
        ("kind", ctypes.c_uint), ("status", ctypes.c_uint), ("value", ctypes.c_uint), ("upper", ctypes.c_uint),
    ]  # fmt: skip


class Monitor:
    """Samples from now until the process ends. OSError where there is no NVML or no such GPU."""

    def __init__(self, bus_id: str, library: str = "libnvidia-ml.so.1") -> None:
        self._nvml = ctypes.CDLL(library)
        self._device = ctypes.c_void_p()
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByPciBusId_v2", bus_id.encode(), ctypes.byref(self._device))
        self.limit = self._number("nvmlDeviceGetEnforcedPowerLimit") / 1e3  # watts
        self._read: list[tuple[float, float, int, int, int]] = []  # time, watts, MHz, °C, reasons
        threading.Thread(target=self._watch, daemon=True).start()

    def between(self, began: float, ended: float) -> GpuState | None:
        """The state between two times of `time.perf_counter()`; None where nothing was sampled."""
        read = [r for r in self._read if began <= r[0] <= ended]
        if not read:
            return None
        _, watts, clocks, heat, reasons = zip(*read, strict=True)
        return GpuState(
            watts=median(watts), most_watts=max(watts), limit_watts=self.limit, clock_mhz=float(median(clocks)),
            least_clock_mhz=float(min(clocks)), celsius=float(max(heat)),
            held_back=sum(bool(r & HELD_BACK) for r in reasons) / len(reasons), readings=len(read),
        )  # fmt: skip

    def _watch(self) -> None:
        while True:
            time.sleep(EVERY)
            try:
                now = (
                    self._watts(), self._number("nvmlDeviceGetClockInfo", SM),
                    self._number("nvmlDeviceGetTemperature", CORE), self._reasons(),
                )  # fmt: skip
            except OSError:  # the driver does not say
                continue
            self._read.append((time.perf_counter(), *now))

    def _watts(self) -> float:
        value = _Value(field=POWER_NOW)
        self._ask("nvmlDeviceGetFieldValues", self._device, 1, ctypes.byref(value))
        return (self._number("nvmlDeviceGetPowerUsage") if value.status else value.value) / 1e3

    def _reasons(self) -> int:
        reasons = ctypes.c_ulonglong()
        self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._device, ctypes.byref(reasons))
        return reasons.value

    def _number(self, function: str, *args: int) -> int:
        found = ctypes.c_uint()
        self._ask(function, self._device, *args, ctypes.byref(found))
        return found.value

    def _ask(self, function: str, *args: object) -> None:
        try:
            status = getattr(self._nvml, function)(*args)
        except AttributeError as error:
            raise OSError(f"NVML has no {function}") from error
        if status:
            raise OSError(f"{function} answers {status}")
