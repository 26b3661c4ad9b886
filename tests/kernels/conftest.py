"""Carries the ops to the device that GROK_TEST_DEVICE names, before a test module looks for them; and what tests of the
native CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import grok_kernels
from grok_kernels import cpu
from tests.kernels import on_device
from tests.kernels.backends import ISAS

if not on_device.ON_CPU:
    on_device.install()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU backend serves, with each instruction set in turn."""
    with cpu.use_isa(request.param), grok_kernels.use_backend("cpu"):
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
