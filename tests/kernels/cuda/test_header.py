"""The header for C++ programs compiles alone, and the example that embeds the kernels links without Python and
torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[3] / "csrc"
HEADERS = sorted((CSRC / "cuda/include/grok").glob("*.h"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_a_header_needs_nothing_before_it(header: Path) -> None:
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", "-x", "c++", "-include", header, "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_example_builds(tmp_path: Path) -> None:
    program = tmp_path / "embed_kernels"
    kernels = ("route/instantiations/route.cu", "gemm/instantiations/fp8.cu", "gemm/instantiations/rows.cu")
    sources = [CSRC / "cuda/example/embed_kernels.cu", *(CSRC / "cuda" / name for name in kernels)]
    options = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "--threads", "0", "-I", CSRC]
    command = ["nvcc", *options, *sources, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert program.is_file()
