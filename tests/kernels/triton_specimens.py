"""Launches of every Triton kernel at Grok-1's sizes, to check what the compiler makes of them.

`python -m tests.kernels.triton_specimens [--chip NAME] [PATTERN ...]` compiles them without a GPU and prints one JSON
object per kernel. It runs in a process of its own, since under TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor

from grok_kernels import Weight
from grok_kernels.chips import CHIPS, Chip
from grok_kernels.triton import cross_compile, gemm, launch, table
from grok_kernels.tuning import Gemm, default_gemm
from tests.kernels import compiled

D = 6144  # of Grok-1

SPECIMENS: dict[str, Callable[[], Any]] = {}


def specimen(function: Callable[[], Any]) -> Callable[[], Any]:
    """Registers a call of an op on `meta` tensors, by the function's name. Every launch in it is compiled."""
    SPECIMENS[function.__name__] = function
    return function


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@specimen
def rms_norm() -> Any:
    return table.rms_norm(empty(64, D), empty(D), 1e-5)


@specimen
def sandwich_norm() -> Any:
    return table.sandwich_norm(empty(64, D), empty(64, D), empty(D), empty(D), 1e-5)


@specimen
def sandwich_norm_fp8() -> Any:
    return table.sandwich_norm_fp8(empty(64, D), empty(64, D), empty(D), empty(D), 1e-5)


@specimen
def quantize_fp8() -> Any:
    return table.quantize_fp8(empty(64, D), 128)


@specimen
def quantize_int8() -> Any:
    return table.quantize_int8(empty(64, D), 0)


@specimen
def route_topk() -> Any:
    return table.route_topk(empty(8192, D), empty(8, D, dtype=torch.float32), 2, 0.0, False)


@specimen
def route_and_group() -> Any:
    return table.route_and_group(empty(64, D), empty(8, D, dtype=torch.float32), 2, 0.0, False)


@specimen
def group_tokens() -> Any:
    return table.group_tokens(empty(8192, 2, dtype=torch.int32), 8)


def _rope(cache: torch.dtype) -> Any:
    pages, scale = empty(4096, 8, 16, 128, dtype=cache), None
    if cache.itemsize == 1:
        scale = empty(4096, 8, 16, dtype=torch.float32)
    q, kv, index = empty(64, 48, 128), empty(64, 8, 128), empty(64, dtype=torch.int32)
    table.rope_store_kv(q, kv, kv, pages, pages, index, index, empty(8192, 128, dtype=torch.float32), scale, scale)


@specimen
def rope_store_kv() -> Any:
    return _rope(torch.bfloat16)


@specimen
def rope_store_kv_fp8() -> Any:
    return _rope(FP8)


@specimen
def sample_top_p() -> Any:
    row = empty(64, dtype=torch.float32)
    return table.sample_top_p(empty(64, 131072, dtype=torch.float32), row, row, row)


E, F, T = 8, 32768, 64  # Grok-1's experts, their width, and a number of tokens
FP8 = torch.float8_e4m3fn


def _weight(e: int, n: int, k: int, dtype: torch.dtype, groups: int = 1) -> Weight:
    scales = empty(e, groups, n, dtype=torch.float32) if dtype.itemsize == 1 else None
    return Weight.of(empty(e, n, k, dtype=dtype), scales)


def few_rows(n: int, k: int, dot: str, weight: torch.dtype, chip: Chip, rows: int, *, pair: bool) -> Gemm:
    """The variant for few rows. It is used only on chips where it was shown to give the same bits."""
    return default_gemm(dot, weight, chip, few=True, pair=pair)


def _down(x: torch.dtype, w: torch.dtype, groups: int = 1) -> Any:
    x_scale = empty(T, F // 128, dtype=torch.float32) if x.itemsize == 1 else None
    offsets = empty(E + 1, dtype=torch.int32)
    return table.grouped_gemm(empty(T, F, dtype=x), _weight(E, D, F, w, groups), offsets, x_scale, None)


@specimen
def grouped_gemm_fp8() -> Any:
    return _down(FP8, FP8)


@specimen
def grouped_gemm_fp8_few() -> Any:
    with patch.object(gemm, "gemm", few_rows):
        return _down(FP8, FP8)


@specimen
def grouped_gemm_int8_weights_few() -> Any:
    with patch.object(gemm, "gemm", few_rows):
        return _down(torch.bfloat16, torch.int8, 8)


@specimen
def grouped_gemm_int8_weights() -> Any:
    return _down(torch.bfloat16, torch.int8, 8)


@specimen
def grouped_gemm_bf16() -> Any:
    return _down(torch.bfloat16, torch.bfloat16)


@specimen
def grouped_gemm_int8() -> Any:
    return _down(torch.int8, torch.int8, 8)


def _moe(dtype: torch.dtype, groups: int, act_format: str) -> Any:
    weights = _weight(E, 2 * F, D, dtype, groups), _weight(E, D, F, dtype, groups)
    topk, experts = empty(T, 2, dtype=torch.float32), empty(T, 2, dtype=torch.int32)
    return table.moe(empty(T, D), topk, experts, *weights, "gelu_tanh", act_format)


@specimen
def moe_fp8() -> Any:
    return _moe(FP8, 1, "fp8")


@specimen
def moe_int8_weights() -> Any:
    return _moe(torch.int8, 8, "none")


def _attention(
    queries: tuple[int, ...], keys: int, cache: torch.dtype = torch.bfloat16, page: int = 16, **flags: Any
) -> Any:
    """Attention of requests with this many queries each, or, for a tuple, with the given numbers."""
    pages, scale = empty(4096, 8, page, 128, dtype=cache), None
    if cache.itemsize == 1:
        scale = empty(4096, 8, page, dtype=torch.float32)
    requests = len(queries)
    table_BN = empty(requests, keys // page, dtype=torch.int32)
    starts, lengths = empty(requests + 1, dtype=torch.int32), empty(requests, dtype=torch.int32)
    q = empty(sum(queries), 48, 128, dtype=torch.float32 if cache == torch.float32 else torch.bfloat16)
    flags = {"scale": 0.09, "softcap": 30.0, "window": 0, "temperature_len": 0, **flags}
    table.paged_attention(q, pages, pages, table_BN, starts, lengths, max(queries), *flags.values(), scale, scale)


@specimen
def attention_decode() -> Any:
    return _attention((1,) * 64, 131072)


@specimen
def attention_decode_fp8() -> Any:
    return _attention((1,) * 64, 131072, FP8)


@specimen
def attention_prefill() -> Any:
    return _attention((8192,), 8192)


@specimen
def attention_mixed_fp8() -> Any:
    """Prompts and single queries in one batch, with pages of 64 and every option on."""
    return _attention((2048, *(1,) * 63), 8192, FP8, 64, window=4096, temperature_len=1024)


@specimen
def attention_prefill_fp8() -> Any:
    return _attention((8192,), 8192, FP8)


@specimen
def attention_prefill_fp8_wide_pages() -> Any:
    return _attention((8192,), 8192, FP8, 64)


@specimen
def attention_mixed_fp8_requests() -> Any:
    """More requests than the smallest variant of the kernel takes."""
    return _attention((2048, *(1,) * 299), 8192, FP8)


@specimen
def attention_mixed_fp32() -> Any:
    return _attention((64, 1), 8192, torch.float32)


@specimen
def attention_plain() -> Any:
    return _attention((512, 1), 8192, softcap=0.0)


@triton.jit
def _spills(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x))


@specimen
def spills() -> None:
    """A kernel that must spill, since a thread holds 512 values at once. It shows that the check can fail."""
    x = empty(16384, dtype=torch.float32)
    launch.launch(_spills, (1,), x, x, N=16384, num_warps=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--chip", choices=CHIPS, default="h100")
    a = parser.parse_args()
    chip = CHIPS[a.chip]
    for name, call in SPECIMENS.items():
        if any(fnmatch(name, pattern) for pattern in a.patterns):
            for found in cross_compile.launches(call, chip):
                kernel = asdict(compiled.inspect(found, chip))
                print(json.dumps({"specimen": name, "triton": triton.__version__, **kernel}), flush=True)


if __name__ == "__main__":
    main()
