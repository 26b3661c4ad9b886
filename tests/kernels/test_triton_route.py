"""The router and the grouping of its experts in one launch: the same bits as the two ops, again and again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grok_kernels
from tests.kernels.backends import BACKENDS
from tests.kernels.cases import randn
from tests.kernels.on_device import DEVICE

if "triton" not in BACKENDS:
    pytest.skip("Triton's kernels are not interpreted here", allow_module_level=True)

from grok_kernels.triton import launch, route, table


def route_and_group(*args: Any) -> Any:
    with grok_kernels.use_backend("triton"):
        return grok_kernels.route_and_group(*args)


@pytest.mark.parametrize(("t", "e", "k"), [(0, 8, 2), (1, 8, 2), (3, 8, 2), (64, 8, 2), (7, 5, 3)])
def test_one_launch_is_the_two_ops(t: int, e: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, router = randn(t, 96, dtype=torch.bfloat16), randn(e, 96, seed=1)
    with grok_kernels.use_backend("triton"):
        weights, experts = grok_kernels.route_topk(x, router, k, 3.0, True)
        expected = (weights, experts, *grok_kernels.group_tokens(experts, e))
    done = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(route, "counter", lambda device: done)
    for _ in range(2):
        got = route_and_group(x, router, k, 3.0, True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert done.item() == 0


@pytest.mark.parametrize(("t", "launches"), [(1, 1), (512, 1), (513, 3)])
def test_how_many_launches(t: int, launches: int) -> None:
    x, router = torch.empty(t, 64, device="meta"), torch.empty(8, 64, device="meta")
    with launch.recording() as found:
        table.route_and_group(x, router, 2, 0.0, False)
    assert len(found) == launches


def test_past_a_block_it_is_still_the_two_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route, "ONE_HOT", 128)
    x, router = randn(20, 32), randn(8, 32, seed=1)
    _weights, experts, order, offsets = route_and_group(x, router, 2)
    with grok_kernels.use_backend("reference"):
        expected = grok_kernels.group_tokens(experts, 8)
    assert torch.equal(order, expected[0])
    assert torch.equal(offsets, expected[1])
