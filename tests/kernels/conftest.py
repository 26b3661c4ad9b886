"""Redirects the ops to the device of GROK_TEST_DEVICE before test modules import them; fixtures of the CPU kernels'
tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import grok_kernels
from grok_kernels import cpu
from tests.kernels import on_device
from tests.kernels.backends import ISAS

if not on_device.ON_CPU:
    on_device.install()

if folder := os.environ.get("GROK_TEST_NATIVE"):  # the module of `make sanitize`, and no other of the same name
    from grok_kernels import _C

    assert Path(_C.__file__).is_relative_to(Path(folder).resolve()), f"{_C.__file__} is not in {folder}"


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Forces the CPU backend, with each instruction set in turn."""
    with cpu.use_isa(request.param), grok_kernels.use_backend("cpu"):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
