"""The machine and the software under a measurement."""

from __future__ import annotations

import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
import torch

import grok_kernels

from .schema import Environment


def environment(device: str = "cpu") -> Environment:
    """The machine and software that a measurement on `device` depends on."""
    on_gpu, info = device.startswith("cuda"), ""
    with suppress(OSError):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    clock, driver = _value(r"^cpu MHz\s*: (.*)", info), None
    if on_gpu:
        told = _output("nvidia-smi", "--query-gpu=clocks.current.sm,driver_version", "--format=csv,noheader,nounits")
        clock, driver = told.splitlines()[0].split(", ") if told else (None, None)
    isa = triton = None
    with suppress(NotImplementedError):  # without the native module
        isa = grok_kernels.cpu.isa()
    with suppress(PackageNotFoundError):
        triton = version("triton")
    commit, dirty = _commit()
    return Environment(
        chip=torch.cuda.get_device_name(device) if on_gpu else f"{_cpu(info)} ({cores} cores)",
        device="cuda" if on_gpu else "cpu",
        cores=cores,
        threads=torch.get_num_threads(),
        isa=isa,
        clock_mhz=float(clock) if clock and clock.replace(".", "", 1).isdigit() else None,
        driver=driver,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=triton,
        compiler=getattr(sys.modules.get("grok_kernels._C"), "compiler", None),
        os=platform.platform(),
        commit=commit,
        dirty=dirty,
    )


def _cpu(info: str) -> str:
    """The CPU's name, with family and model numbers, as a virtual machine may hide the name."""
    name = _value(r"^model name\s*: (.*)", info) or platform.processor() or platform.machine()
    family, model = _value(r"^cpu family\s*: (.*)", info), _value(r"^model\s*: (.*)", info)
    return f"{name}, family {family} model {model}" if family and model else name


def command() -> str:
    """The command line of `grok-engine` that is running."""
    context = click.get_current_context()
    given = context.find_root().obj
    return f"grok-engine {shlex.join(given)}" if given else context.command_path


def peak_bytes(device: str = "cpu") -> int:
    """Peak memory: of this process on a CPU, of tensors on a GPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _value(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1] if found else None


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
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):  # not there, not willing, or hanging
        return None
