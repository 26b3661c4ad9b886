"""Read before any test imports torch."""

from __future__ import annotations

import os
import signal

import pytest

# A shell starts what runs in its background with interrupts ignored, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' products are small: beside other load, threads that spin while they wait take several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Triton's kernels run on the CPU, interpreted, unless the tests are to run on a GPU. Triton reads this at import.
if os.environ.get("GROK_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    if os.environ.get("GROK_TEST_DEVICE", "cpu").startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.exit(f"GROK_TEST_DEVICE={os.environ['GROK_TEST_DEVICE']}, and there is no GPU", returncode=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GROK_TEST_SHARD=i/n leaves the i-th of n parts, from 0 on: on a GPU most of the time goes into compiling kernels, which
    several processes do sooner."""
    part, _, parts = os.environ.get("GROK_TEST_SHARD", "0/1").partition("/")
    items[:] = items[int(part) :: int(parts)]
