"""After an engine's start-up Triton compiles nothing: a kernel's machine code depends on the model, not on the
batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels.triton.steps import FEW, REQUESTS, requests_of, startup
from tests.kernels.backends import BACKENDS, serving
from tests.kernels.compiling import printed

if "triton" not in BACKENDS:
    pytest.skip("Triton is not installed", allow_module_level=True)


def replayed() -> list[dict[str, Any]]:
    return printed("tests.kernels.triton_steps")


def test_no_kernel_is_compiled_after_startup() -> None:
    """400 steps of all kinds, in five models and formats of weights, activations and pages."""
    assert len(replayed()) == 5
    for served in replayed():
        assert not served["after"], served


def test_startup_compiles_no_more_than_a_kernel_for_each_of_its_uses() -> None:
    for served in replayed():
        assert len(served["at_startup"]) <= 24, served


def test_startup_meets_every_class_of_requests() -> None:
    assert startup(64, 1024) == [(1,), (FEW + 1,), (1024,)]
    for most in (1, 256, 257, 512, 513, 1025, 2000):
        steps = startup(most, 8192)
        assert max(map(len, steps)) <= most
        for decoding in (True, False):
            met = {requests_of(len(step)) for step in steps if (max(step) == 1) == decoding}
            assert met == {requests_of(n) for n in range(1, most + 1)}
    assert all(sum(step) <= 300 for step in startup(300, 300))


def test_attention_finds_its_requests_in_the_second_class() -> None:
    requests = REQUESTS + 1
    torch.manual_seed(0)
    queries = [1] * requests
    queries[3] = 5
    starts = torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.randn(sum(queries), 2, 16)
    k, v = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16)
    table = torch.randint(4, (requests, 1), dtype=torch.int32)
    lengths = torch.randint(5, 16, (requests,), dtype=torch.int32)

    def attended() -> Tensor:
        result: Tensor = grok_kernels.paged_attention(q, k, v, table, starts, lengths, 5, scale=0.25)
        return result

    with serving("reference"):
        expected = attended()
    with serving("triton"):
        torch.testing.assert_close(attended(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, FEW - 1, FEW, FEW + 1, 1024, 1025])
def test_rows_are_grouped_alike_in_blocks_of_either_size(rows: int) -> None:
    torch.manual_seed(rows)
    experts = torch.randint(8, (rows, 1), dtype=torch.int32)
    with serving("reference"):
        expected = grok_kernels.group_tokens(experts, 8)
    with serving("triton"):
        found = grok_kernels.group_tokens(experts, 8)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
