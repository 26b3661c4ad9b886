"""Finds the CUDA toolkit. Uses only the standard library: setup.py runs this file before the package exists."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def cuda_home(guess: str | None) -> str | None:
    """The toolkit's folder: torch's `guess` if CUDA's headers are in it, else the one that nvcc itself reports.

    torch takes the folder above the nvcc on the path. Where that nvcc is a wrapper script in another place, the headers
    are not there, and nothing compiles. Returns `guess` where there is no nvcc, or it does not answer.
    """
    if guess and Path(guess, "include/cuda_runtime.h").is_file():
        return guess
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return guess
    try:
        said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.TimeoutExpired):
        return guess
    tops = [line.split("TOP=", 1)[1].strip() for line in said.splitlines() if "TOP=" in line]
    return str(Path(tops[0]).resolve()) if tops else guess
