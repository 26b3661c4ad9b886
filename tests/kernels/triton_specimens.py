"""Launches of every Triton kernel at the real sizes of Grok-1, for the checks of what the compiler makes of them.

`python -m tests.kernels.triton_specimens [--chip NAME] [PATTERN ...]` compiles them without a GPU and prints one JSON
object a kernel; it runs in a process of its own, since under TRITON_INTERPRET=1 nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from grok_kernels.triton import compiled, launch, table
from grok_kernels.tuning import CHIPS

D = 6144  # of Grok-1

E4M3 = ("quantize_fp8", "rope_store_kv_fp8")  # write a type that Triton has from compute capability 8.9 on
SPECIMENS: dict[str, Callable[[], Any]] = {}


def specimen(function: Callable[[], Any]) -> Callable[[], Any]:
    """One call of an op, with tensors on `meta`: named by its function, every launch in it is compiled."""
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
def quantize_fp8() -> Any:
    return table.quantize_fp8(empty(64, D), 128)


@specimen
def quantize_int8() -> Any:
    return table.quantize_int8(empty(64, D), 0)


@specimen
def route_topk() -> Any:
    return table.route_topk(empty(8192, D), empty(8, D, dtype=torch.float32), 2, 0.0, False)


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
    return _rope(torch.float8_e4m3fn)


@specimen
def sample_top_p() -> Any:
    row = empty(64, dtype=torch.float32)
    return table.sample_top_p(empty(64, 131072, dtype=torch.float32), row, row, row)


@triton.jit
def _spills(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x))


@specimen
def spills() -> None:
    """Not ours to run: a thread holds 512 values until their sum is known, so that the check is seen to fail."""
    x = empty(16384, dtype=torch.float32)
    launch.launch(_spills, (1,), x, x, N=16384, num_warps=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--chip", choices=CHIPS, default="h100")
    a = parser.parse_args()
    chip = CHIPS[a.chip]
    for name, call in SPECIMENS.items():
        if name in E4M3 and 0 < chip.capability < 89:
            continue
        if any(fnmatch(name, pattern) for pattern in a.patterns):
            for found in compiled.launches(call, chip):
                print(json.dumps({"specimen": name, **asdict(compiled.compile_launch(found, chip))}), flush=True)


if __name__ == "__main__":
    main()
