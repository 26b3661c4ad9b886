"""The quick problems of the registry under pytest-benchmark: `pytest benchmarks/ --benchmark-only -k moe`."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch

from grok_bench.kernels import cases, contestant
from grok_bench.kernels.contestant import Contestant
from grok_bench.kernels.device import Device
from grok_bench.kernels.entrant import Local
from grok_bench.kernels.problems import SETS, Problem, select

contestant.load()
QUICK = [(p, c) for p in select(SETS["quick"]) for c in contestant.entrants(p, "cpu", compiles=False)]


@pytest.fixture(scope="module")
def cpu() -> Device:
    return Device(probed=False)


@pytest.mark.parametrize(("problem", "entrant"), QUICK, ids=[f"{p.name}-{c.name}" for p, c in QUICK])
def bench_kernel(benchmark: Any, cpu: Device, problem: Problem, entrant: Contestant) -> None:
    if why := entrant.missing():
        pytest.skip(why)
    with torch.inference_mode(), entrant.within():
        case = cases.build(problem, cpu.name, cpu.cold)
        local = Local(entrant, case, cpu, limit=60)
        assert local.check() <= local.tolerance
        turns = count()
        benchmark(lambda: local.calls[next(turns) % len(local.calls)]())
    benchmark.extra_info["GB/s"] = round(case.bytes / benchmark.stats.stats.median / 1e9, 2)
    benchmark.extra_info["GFLOP/s"] = round(case.operations / benchmark.stats.stats.median / 1e9, 1)
