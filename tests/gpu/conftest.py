"""These tests need a GPU and GROK_TEST_DEVICE=cuda. With cpu:0 instead they run on the CPU at small sizes, with
Triton's interpreter if TRITON_INTERPRET=1, which only shows that the tests themselves work."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("GROK_TEST_DEVICE", "cpu")


def _weights(item: pytest.Item) -> str:
    """The weights that a full-size test uses: the rest of its call's name, "fp8xfp8-1" of "moe-fp8xfp8-1"."""
    call = str(getattr(getattr(item, "callspec", None), "params", {}).get("c", ""))
    return call.partition("-")[2] if item.path.parent.name == "gpu" else ""


def why_not() -> str:
    if DEVICE == "cpu":
        return "needs a GPU, and GROK_TEST_DEVICE=cuda"
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        return f"GROK_TEST_DEVICE={DEVICE}, and there is no GPU"
    return ""


@pytest.hookimpl(tryfirst=True)  # before the tests are sharded
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_weights)  # tests with the same weights in a row, so that these gigabytes are made once
    reason = why_not()
    for item in items:
        if reason and item.path.parent.name == "gpu":
            item.add_marker(pytest.mark.skip(reason=reason))
