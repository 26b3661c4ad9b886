"""The GEMM launchers for Hopper, compiled for the host emulation once per session."""

from __future__ import annotations

import ctypes

import pytest

from tests.kernels.cuda.emulation import CSRC, HERE, compiled


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    sources = sorted((CSRC / "cuda/gemm/instantiations").glob("*.cu"))
    emulated = (HERE / "gemm_emulated.cpp", HERE / "swapped_emulated.cpp")
    return compiled(tmp_path_factory.mktemp("products") / "products.so", *sources, *emulated)
