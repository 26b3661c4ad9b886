"""These tests need a GPU: GROK_TEST_DEVICE=cuda. With GROK_TEST_DEVICE=cpu:0 they run on the CPU at small sizes, Triton's
kernels interpreted if TRITON_INTERPRET=1: that shows no more than that the tests themselves work."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("GROK_TEST_DEVICE", "cpu")


def why_not() -> str:
    if DEVICE == "cpu":
        return "needs a GPU, and GROK_TEST_DEVICE=cuda"
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        return f"GROK_TEST_DEVICE={DEVICE}, and there is no GPU"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if reason and item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason=reason))
