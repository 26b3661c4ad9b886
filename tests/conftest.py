"""Settings that must hold before any test imports torch or Triton."""

from __future__ import annotations

import os
import signal

import pytest

# A shell starts background jobs with SIGINT ignored. Processes that the tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The tests' products are small. On a loaded machine, threads that spin while waiting make them several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Unless the tests run on a GPU, Triton's kernels run in its interpreter. Triton reads this variable at import.
if os.environ.get("GROK_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure() -> None:
    if os.environ.get("GROK_TEST_DEVICE", "cpu").startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.exit(f"GROK_TEST_DEVICE={os.environ['GROK_TEST_DEVICE']}, and there is no GPU", returncode=2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GROK_TEST_SHARD=i/n keeps every n-th test, from the i-th on (i from 0): on a GPU most of the time goes into
    compiling kernels, which several processes do in parallel."""
    part, _, parts = os.environ.get("GROK_TEST_SHARD", "0/1").partition("/")
    items[:] = items[int(part) :: int(parts)]
