"""Compiles kernels for the host emulation and calls the functions that they export."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

CSRC = Path(__file__).resolve().parents[3] / "csrc"
HERE = Path(__file__).parent


def compiled(library: Path, *sources: Path, optimise: str = "-O2") -> ctypes.CDLL:
    """A library of the sources and the emulated machine."""
    command = ["g++", "-std=c++17", optimise, "-shared", "-fPIC", "-Wall", "-DGROK_HOST_EMULATION", f"-I{CSRC}"]
    machine = sorted((CSRC / "cuda/host_emulation").glob("*.cpp"))
    objects = [library.with_name(f"{i}-{path.stem}.o") for i, path in enumerate([*sources, *machine])]
    running = [
        subprocess.Popen(
            [*command[:3], *command[4:], "-c", "-x", "c++", path, "-o", to], stderr=subprocess.PIPE, text=True
        )
        for path, to in zip([*sources, *machine], objects, strict=True)
    ]
    for process in running:
        _, said = process.communicate()
        assert process.returncode == 0, said
    done = subprocess.run(
        [*command, "-Wl,-z,defs", "-o", library, *objects], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def call(function: Any, *args: Any) -> None:
    """Calls a function whose last two arguments receive an error message; raises RuntimeError with that message."""
    error = ctypes.create_string_buffer(8192)
    if function(*args, error, len(error)):
        raise RuntimeError(error.value.decode())
