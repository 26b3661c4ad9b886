"""paged_attention at Grok-1's heads: decode and prefill on each backend, beside torch's scaled_dot_product_attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import grok_kernels

C, PAGE = 128, 64
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def pages(x_GLC: Tensor, order: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(P, G, S, C) in a scrambled order, and scales where the type needs them."""
    x = x_GLC.unflatten(1, (-1, PAGE)).transpose(0, 1)[order]
    if dtype != torch.float8_e4m3fn:
        return x.contiguous(), None
    scale = x.float().abs().amax(-1) / 448
    return (x / scale.unsqueeze(-1)).to(dtype).contiguous(), scale


@pytest.mark.parametrize("backend", ["sdpa", "reference", "cpu"])
@pytest.mark.parametrize("cache", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 128), (1, 4096), (1, 32768), (512, 512), (512, 4096)])
@pytest.mark.parametrize(("heads", "groups"), [(12, 2), (48, 8)])
def bench_paged_attention(
    benchmark: Any, heads: int, groups: int, queries: int, keys: int, cache: str, backend: str
) -> None:
    if backend == "sdpa" and cache == "fp8":
        pytest.skip("torch's attention takes no fp8")
    if backend == "reference" and queries * keys * heads > 10_000_000:
        pytest.skip("takes seconds")
    if backend == "cpu" and not (status := grok_kernels.backends()["paged_attention"]["cpu"]).available:
        pytest.skip(status.reason)
    q_HNC, k_GLC, v_GLC = (
        torch.randn(n, length, C, dtype=torch.bfloat16)
        for n, length in ((heads, queries), (groups, keys), (groups, keys))
    )
    order = torch.randperm(keys // PAGE)
    (k_cache, k_scale), (v_cache, v_scale) = (pages(x, order, DTYPES[cache]) for x in (k_GLC, v_GLC))
    table = order.argsort().int().unsqueeze(0)
    starts, lengths = torch.tensor([0, queries], dtype=torch.int32), torch.tensor([keys], dtype=torch.int32)
    q_THC, scale = q_HNC.transpose(0, 1).contiguous(), C**-0.5
    hidden = torch.arange(keys) > torch.arange(keys - queries, keys).unsqueeze(1)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        # without a mask it does more than it must where the queries end a longer context, and is still the fastest way
        causal = queries == keys and mask is None
        return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)

    def paged() -> Tensor:
        return grok_kernels.paged_attention(
            q_THC, k_cache, v_cache, table, starts, lengths, queries, scale, k_scale=k_scale, v_scale=v_scale
        )

    with torch.inference_mode():
        if backend == "sdpa":
            args = q_HNC.unsqueeze(0), k_GLC.unsqueeze(0), v_GLC.unsqueeze(0)
            benchmark(sdpa, *args)
        else:
            with grok_kernels.use_backend(backend):
                exact = sdpa(*(x.float().unsqueeze(0) for x in (q_HNC, k_GLC, v_GLC)), ~hidden)[0].transpose(0, 1)
                error = 0.1 if cache == "fp8" else 0.01
                torch.testing.assert_close(paged().float(), exact, rtol=error, atol=error)
                benchmark(paged)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["GB/s"] = round((k_cache.nbytes + v_cache.nbytes) / seconds / 1e9, 2)
    seen = queries * (keys - (queries - 1) / 2)
    benchmark.extra_info["GFLOP/s"] = round(4 * seen * heads * C / seconds / 1e9, 1)
