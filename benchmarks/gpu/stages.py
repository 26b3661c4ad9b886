"""The stages of `make bench-gpu`, in order: what must be right, then what is measured, then why it is as it is. Building
apart, their limits are 8 minutes in all."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from .run import Command, Stage
from .slowest import slowest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
ON_GPU = {"GROK_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25")
OPS = (
    "test_ops_*.py",
    "test_triton_gemm.py",
    "test_triton_attention.py",
    "test_triton_route.py",
)  # those that `on_device` carries
FULL_SIZE = 18 << 30  # bytes that the tests at full size may hold at once
MEASURED_SECONDS = "0.4"  # of rounds, a problem
LATENCY = (
    "latency", "--device", "cuda", "--model", "grok-1", "--layers", "2", "--dummy", "--weights", "fp8",
    "--batch-size", "8", "--input-len", "256", "--output-len", "64", "--num-iters", "3", "--num-iters-warmup", "1",
    "--max-num-seqs", "8", "--max-model-len", "2048",
)  # fmt: skip
SANITIZER = "compute-sanitizer"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
NO_COUNTERS = ("ERR_NVGPUCTRPERM", "Failed to initialize the profiler", "LibraryNotLoaded", "Device not supported")


def stages(name: str, folder: Path, patterns: Sequence[str] = ()) -> list[Stage]:
    """`name` is that of the chip and the day, `folder` where results go; `patterns` as for `grok-engine bench kernels`."""
    kernels, graphs, eager = (folder / f"{name}{end}.json" for end in ("", "-decode-graphs", "-decode-eager"))
    kernel_args = [*(patterns or ["@cuda-quick"]), "--device", "cuda", "--seconds", MEASURED_SECONDS, "--limit", "20"]
    return [
        Stage("environment", lambda: [_module("environment", "about")], 20),
        Stage("build", _build, 600),
        Stage("correctness", lambda: [*_tests(), *_sanitizers()], 190, correctness=True, at_once=True),
        Stage("kernels", lambda: [_bench("kernels", "kernels", *kernel_args, "--json", str(kernels))], 130),
        Stage("decode with graphs", lambda: [_bench("decode-graphs", *LATENCY, "--json", str(graphs))], 45),
        Stage(
            "decode without", lambda: [_bench("decode-eager", *LATENCY, "--enforce-eager", "--json", str(eager))], 40
        ),
        Stage("profiles", lambda: [_profile(*which) for which in slowest(kernels)], 50),
    ]


def _module(name: str, module: str, *args: str, **env: str) -> Command:
    return Command(name, (PYTHON, "-m", f"benchmarks.gpu.{module}", *args), {"PYTHONUNBUFFERED": "1", **env})


def _bench(name: str, *args: str) -> Command:
    return Command(name, (PYTHON, "-m", "grok_engine.cli", "bench", *args), {"PYTHONUNBUFFERED": "1"})


def _build(package: Path = ROOT / "kernels/grok_kernels", sources: Path = ROOT / "csrc") -> list[Command]:
    """What this interpreter's package lacks, or has of older sources."""
    modules = [package / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}" for name in ("_C", "_CUDA")]
    newest = max(path.stat().st_mtime for path in sources.rglob("*.*"))
    if all(module.is_file() and module.stat().st_mtime >= newest for module in modules):
        return []
    return [Command("build", (PYTHON, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"))]


def _tests() -> list[Command]:
    """Side by side: compiling the kernels takes most of the time, and it is the host's."""
    shards = max(1, min(5, (os.cpu_count() or 2) // 2 - 4))
    total = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    whole = min(shards, max(1, total // FULL_SIZE))
    files = [file for pattern in OPS for file in sorted((ROOT / "tests/kernels").glob(pattern))]
    ops = (*PYTEST, *(str(file.relative_to(ROOT)) for file in files), "-k", "not refuses")
    found = [Command(f"ops-{i}", ops, {**ON_GPU, "GROK_TEST_SHARD": f"{i}/{shards}"}) for i in range(shards)]
    full = (*PYTEST, "tests/gpu", "--ignore=tests/gpu/test_gpu_engine.py")
    found += [Command(f"full-size-{i}", full, {**ON_GPU, "GROK_TEST_SHARD": f"{i}/{whole}"}) for i in range(whole)]
    chosen = "test_gpu_engine or fp32 or bf16 or quality or any_batch or goldens_in_one or (any_number_format and not reference)"
    engine = (
        *PYTEST, "tests/gpu/test_gpu_engine.py", "tests/e2e/test_goldens.py", "tests/engine/test_activations.py",
        "tests/engine/test_invariance.py", "-k", chosen,
    )  # fmt: skip
    return [*found, Command("engine", engine, ON_GPU)]


def _sanitizers() -> list[Command]:
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "GROK_TEST_DEVICE": "cpu:0", "PYTHONUNBUFFERED": "1"}
    run = (PYTHON, "-m", "benchmarks.gpu.small")
    found = [Command("small", run, env)]
    for tool in ("memcheck", "racecheck"):
        argv = (SANITIZER, "--tool", tool, "--error-exitcode", "9", *run, "--few")
        found.append(Command(tool, argv, env, refusals=NO_COUNTERS))
    return found


def _profile(problem: str, contestant: str) -> Command:
    """Clocks as they are: to lock them needs rights, and takes long where there are none."""
    argv = ["ncu", "--clock-control", "none", "--profile-from-start", "off"]
    for section in SECTIONS:
        argv += ["--section", section]
    argv += [PYTHON, "-m", "benchmarks.gpu.once", problem, contestant]
    return Command(f"ncu-{problem.replace('/', '-')}", argv, refusals=NO_COUNTERS)
