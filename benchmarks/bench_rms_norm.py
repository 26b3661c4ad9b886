"""rms_norm at Grok-1's width, each backend that can run here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grok_kernels


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def bench_rms_norm(benchmark: Any, backend: str, tokens: int) -> None:
    status = grok_kernels.backends()["rms_norm"][backend]
    if not status.available:
        pytest.skip(status.reason)
    x_TD = torch.randn(tokens, 6144, dtype=torch.bfloat16)
    weight_D = torch.randn(6144)
    expected = grok_kernels.reference.norm.rms_norm(x_TD, weight_D, 1e-5)
    with torch.inference_mode(), grok_kernels.use_backend(backend):
        torch.testing.assert_close(grok_kernels.rms_norm(x_TD, weight_D), expected)
        benchmark(grok_kernels.rms_norm, x_TD, weight_D)
    benchmark.extra_info["GB/s"] = round(2 * x_TD.nbytes / benchmark.stats.stats.median / 1e9, 2)
