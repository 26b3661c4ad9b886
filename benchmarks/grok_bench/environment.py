"""The machine and the software under a measurement."""

from __future__ import annotations

import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import torch

import grok_kernels

from .schema import Environment

GROUP = Path("/sys/fs/cgroup")  # the process's own in a container


def environment(device: str = "cpu") -> Environment:
    """The machine and software that a measurement on `device` depends on."""
    on_gpu = device.startswith("cuda")
    commit, dirty = _commit()
    return Environment(
        chip=torch.cuda.get_device_name(device) if on_gpu else _chip(),
        device="cuda" if on_gpu else "cpu",
        cores=_cores(),
        threads=torch.get_num_threads(),
        isa=_isa(),
        clock_mhz=_clock(_smi("clocks.current.sm") if on_gpu else _cpu_info("cpu MHz")),
        driver=_smi("driver_version") if on_gpu else None,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        compiler=_compiler(),
        os=platform.platform(),
        commit=commit,
        dirty=dirty,
    )


def command() -> str:
    """The command line of `grok-engine` that is running."""
    context = click.get_current_context()
    given = context.find_root().obj
    return f"grok-engine {shlex.join(given)}" if given else context.command_path


def available_bytes(device: str = "cpu") -> int | None:
    """Free memory on `device`, within the cgroup's limit; None where the system does not say."""
    if device.startswith("cuda"):
        try:
            return int(torch.cuda.mem_get_info(device)[0])
        except (RuntimeError, ValueError, AssertionError):
            return None
    found = [int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, used = _lines(GROUP / "memory.max"), _lines(GROUP / "memory.current")
    if limit and used and limit[0].isdigit():
        cache = sum(int(line.split()[1]) for line in _lines(GROUP / "memory.stat") if line.startswith("inactive_file "))
        found.append(int(limit[0]) - int(used[0]) + cache)
    return min(found, default=None)


def peak_bytes(device: str = "cpu") -> int:
    """Peak memory: of this process on a CPU, of tensors on a GPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cpu_info(name: str) -> str | None:
    values = (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.split("\t")[0].strip() == name)
    return next(values, None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _chip() -> str:
    """The CPU's name, with family and model numbers, as a virtual machine may hide the name."""
    name = _cpu_info("model name") or platform.processor() or platform.machine()
    family, model = _cpu_info("cpu family"), _cpu_info("model")
    numbers = f", family {family} model {model}" if family and model else ""
    return f"{name}{numbers} ({_cores()} cores)"


def _clock(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # the driver does not say
        return None


def _smi(what: str) -> str | None:
    """A value of the first GPU, from nvidia-smi."""
    text = _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits")
    return text.splitlines()[0] if text else None


def _isa() -> str | None:
    try:
        return grok_kernels.cpu.isa()
    except NotImplementedError:
        return None


def _compiler() -> str | None:
    """The compiler of the native kernels, if they name it."""
    try:
        import grok_kernels._C as module
    except ImportError:
        return None
    return getattr(module, "compiler", None)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> tuple[str | None, bool]:
    """The commit of these sources, and whether they have changes; None outside a repository."""
    if told := os.environ.get("GROK_BENCH_COMMIT"):  # set where the sources were copied; + means changes
        return told.rstrip("+"), told.endswith("+")
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    if not _output(*git, "ls-files", here.name):  # installed within another project's repository
        return None, False
    commit = _output(*git, "rev-parse", "--short=12", "HEAD")
    return commit, bool(commit and _output(*git, "status", "--porcelain", "--untracked-files=no"))


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
