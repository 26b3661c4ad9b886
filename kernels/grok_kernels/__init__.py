"""Kernels for models of the Grok-1 kind, usable without the engine. The contract is in `ops`."""

from . import cpu, cuda, reference, triton
from .chips import multiplies_fp8
from .formats import Layout, Spec, values_shape
from .gather import weight_rows
from .layouts import can_pack, pack_into, wants_packed
from .memory import huge_pages, weight_memory
from .ops import (
    group_tokens,
    grouped_gemm,
    moe,
    moe_fp8,
    paged_attention,
    quantize_fp8,
    quantize_int8,
    rms_norm,
    rope_store_kv,
    rope_table,
    route_and_group,
    route_topk,
    sample_top_p,
    sandwich_norm,
    sandwich_norm_fp8,
)
from .registry import Status, backends, capturable, chosen, fuses, mixes_formats, takes_format, use_backend
from .sums import scaled_sum
from .triton.steps import startup as startup_steps
from .weights import Weight

__all__ = [
    "Layout",
    "Spec",
    "Status",
    "Weight",
    "backends",
    "can_pack",
    "capturable",
    "chosen",
    "cpu",
    "cuda",
    "fuses",
    "group_tokens",
    "grouped_gemm",
    "huge_pages",
    "mixes_formats",
    "moe",
    "moe_fp8",
    "multiplies_fp8",
    "pack_into",
    "paged_attention",
    "quantize_fp8",
    "quantize_int8",
    "reference",
    "rms_norm",
    "rope_store_kv",
    "rope_table",
    "route_and_group",
    "route_topk",
    "sample_top_p",
    "sandwich_norm",
    "sandwich_norm_fp8",
    "scaled_sum",
    "startup_steps",
    "takes_format",
    "triton",
    "use_backend",
    "values_shape",
    "wants_packed",
    "weight_memory",
    "weight_rows",
]
