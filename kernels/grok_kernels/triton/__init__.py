"""Registers the Triton kernels: the portable backend for GPUs, and for CPUs under Triton's interpreter.

Each module of this package holds the kernels of some ops and one function an op, which takes the op's arguments in
their order. The first call imports Triton. With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors,
slowly, where the backend is forced: that is how they are tested without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from .. import registry
from ..weights import unsupported

OPS = (  # the functions of `table`
    "group_tokens", "grouped_gemm", "moe", "moe_fp8", "paged_attention", "quantize_fp8", "quantize_int8", "rms_norm",
    "rope_store_kv", "route_and_group", "route_topk", "sample_top_p", "sandwich_norm", "sandwich_norm_fp8",
)  # fmt: skip
FORMATS = ("fp32", "bf16", "int8", "fp8_e4m3")
registry.set_takes("triton", registry.Takes(FORMATS))
OLDEST = (8, 0)  # compute capability: bf16 on the tensor cores


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _supports(*args: Any) -> str | None:
    if reason := unsupported("triton", args, ("rows", "panels")):
        return reason
    device = next(a.device for a in args if isinstance(a, torch.Tensor))
    if device.type == "cpu" and _interpreted():
        return None
    if device.type != "cuda":
        return f"its tensors are on {device}, the triton backend takes those on cuda"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST:
        return f"{device} has compute capability {'.'.join(map(str, capability))}, the triton backend needs 8.0"
    return None


def _kernel(op: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from . import table

        function = getattr(table, op)
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        if device.type != "cuda":
            return function(*args)
        with torch.cuda.device(device):  # Triton launches on the current one
            return function(*args)

    return call


def _missing() -> str:
    """Why no kernel can run here, if so. Does not start CUDA, after which no process may fork."""
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if not _interpreted() and torch.cuda.device_count() == 0:
        return "there is no GPU; on CPU tensors its kernels run under TRITON_INTERPRET=1 alone"
    return ""


if _reason := _missing():
    registry.mark_missing("triton", _reason)
for _op in OPS:
    registry.register(_op, "triton", supports=_supports)(_kernel(_op))
