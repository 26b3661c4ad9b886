"""The two devices: a CPU's probes, and the GPU's path with a stand-in for the driver. No time is looked at."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from grok_bench.kernels import cases, contestant, device, lineup, ours
from grok_bench.kernels.device import Cuda, Device
from grok_bench.kernels.entrant import Local
from grok_bench.kernels.monitor import Monitor
from grok_bench.kernels.problems import select


def test_the_ceiling_that_takes_longer_binds() -> None:
    cpu = Device(small=True)
    for name, best in {"read": 10.0, "fp32": 100.0, "bf16": 200.0, "int8": 400.0}.items():
        if name in cpu.ceilings:
            cpu.ceilings[name].usual = best
    if "read" not in cpu.ceilings:
        cpu.ceilings["copy"].usual = 10.0
    memory = cpu.ceilings.get("read") or cpu.ceilings["copy"]
    assert cpu.binding(1000.0, 90.0, "fp32") == (cpu.ceilings["fp32"], 1000.0)
    assert cpu.binding(1000.0, 90.0, "bf16") == (memory, 90.0)
    assert cpu.binding(1000.0, 10.0, "int8") == (cpu.ceilings["int8"], 1000.0)
    assert cpu.binding(1000.0, 10.0, "fp8") == (cpu.ceilings["bf16"], 1000.0)  # a CPU multiplies it as that
    assert {kept.unit for kept in cpu.kept().values()} == {"B/s", "FLOP/s"}


def test_without_native_kernels_torch_itself_is_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "probes", lambda: None)
    cpu = Device(small=True)
    assert {"copy", "bf16", "fp32"} <= cpu.ceilings.keys()
    assert all(ceiling.rate() > 0 for ceiling in cpu.ceilings.values())


def test_no_ceilings_where_none_are_wanted() -> None:
    assert Device(small=True, probed=False).ceilings == {}
    with pytest.raises(ValueError, match="there is no device 'cuda:9' here: expected one of cpu"):
        device.device("cuda:9")


class Driver:
    """Stands in for torch.cuda on a CPU, and writes down what is asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.refuses = False
        driver = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                driver.log.append("event")
                self.at = time.perf_counter()

            def synchronize(self) -> None:
                driver.log.append("wait")

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at) * 1e3

        class Stream:
            def wait_stream(self, other: Any) -> None: ...

        class CUDAGraph:
            def replay(self) -> None:
                driver.log.append("replay")

        self.Event, self.Stream, self.CUDAGraph = Event, Stream, CUDAGraph

    @contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        self.log.append("capture")
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def current_stream(self) -> Any:
        return self.Stream()

    def synchronize(self) -> None:
        self.log.append("synchronize")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    for name in ("Event", "Stream", "CUDAGraph", "graph", "stream", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    properties = type("Properties", (), {"L2_cache_size": 1 << 10})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda name: properties)
    return made


def test_a_gpu_is_flushed_timed_by_events_and_replays_graphs(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Cuda("cpu", small=True)
    assert gpu.cold == 0
    assert {"copy", "bf16", "fp32"} <= gpu.ceilings.keys()
    flush = Cuda.flush

    def flushed(self: Cuda) -> None:
        driver.log.append("flush")
        flush(self)

    monkeypatch.setattr(Cuda, "flush", flushed)
    lineup.load()
    (problem,) = (p.small() for p in select(["rms_norm/grok-1/decode/t4"]))
    case = cases.build(problem, "cpu")
    (eager,) = contestant.entrants(problem, "cuda", ["torch eager"])
    entrant = Local(eager, case, gpu, limit=5)
    driver.log.clear()
    assert entrant.check() < 0.01
    assert driver.log.count("capture") == len(case.inputs)
    driver.log.clear()
    assert entrant.time(1) > 0
    assert driver.log == ["flush", "event", "replay", "event", "wait"]


def test_what_cannot_be_captured_is_called(driver: Driver) -> None:
    gpu = Cuda("cpu", small=True, probed=False)
    driver.refuses = True
    done: list[int] = []
    ready = gpu.ready(lambda: done.append(1))
    done.clear()
    ready()
    assert done == [1]
    assert "synchronize" in driver.log


def test_a_gpu_that_is_lost_says_so(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Cuda("cpu", small=True, probed=False)

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(NotImplementedError, match=r"is lost to this process .*--subprocess"):
        gpu.recover()


NVML = r"""
static int reading;
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char* id, void** device) {
  *device = &reading;
  return __builtin_strcmp(id, "00000000:01:00.0") ? 6 : 0;
}
int nvmlDeviceGetEnforcedPowerLimit(void*, unsigned* milliwatts) { *milliwatts = 700000; return 0; }
struct Value { unsigned field, scope; long long at, latency; unsigned kind, status; unsigned value, upper; };
int nvmlDeviceGetFieldValues(void*, int, Value* value) {
  value->status = value->field == 186 ? 0 : 3;
  value->value = ++reading % 2 ? 690000 : 650000;
  return 0;
}
int nvmlDeviceGetPowerUsage(void*, unsigned* milliwatts) { *milliwatts = 1; return 0; }
int nvmlDeviceGetClockInfo(void*, int clock, unsigned* mhz) { *mhz = clock == 1 ? 1410 + reading % 2 : 0; return 0; }
int nvmlDeviceGetTemperature(void*, int, unsigned* celsius) { *celsius = 61; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void*, unsigned long long* reasons) {
  *reasons = reading % 2 ? 4 : 1;  // the power cap; an idle GPU, which is no reason
  return 0;
}
}
"""


def test_power_and_clock_are_read_while_a_problem_runs(tmp_path: Path) -> None:
    """From a library in place of the driver's, every other reading of which is held back by power."""
    source, library = tmp_path / "nvml.cpp", tmp_path / "libnvidia-ml.so.1"
    source.write_text(NVML)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    monitor = Monitor("00000000:01:00.0", str(library))
    began = time.perf_counter()
    while len(monitor._read) < 6:
        time.sleep(0.01)
    state = monitor.between(began, time.perf_counter())
    assert state is not None
    assert state.most_watts == 690.0
    assert state.limit_watts == 700.0
    assert state.least_clock_mhz == 1410.0
    assert state.celsius == 61.0
    assert 0.2 < state.held_back < 0.8
    assert state.readings >= 5
    assert monitor.between(began - 2, began - 1) is None
    with pytest.raises(OSError, match="nvmlDeviceGetHandleByPciBusId_v2 answers 6"):
        Monitor("00000000:02:00.0", str(library))
    with pytest.raises(OSError):
        Monitor("00000000:01:00.0", str(tmp_path / "none.so"))
