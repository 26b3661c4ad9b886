"""Kernels for models of the Grok-1 kind, usable without the engine. `ops` is the contract."""

from . import cpu, cuda, reference, triton
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
from .packing import (
    can_pack,
    is_packed,
    pack_into,
    pack_weight,
    packed_rows,
    packed_shape,
    unpack_weight,
    wants_packed,
)
from .registry import Status, backends, capturable, chosen, fuses, use_backend
from .triton.steps import startup as startup_steps
from .tuning import multiplies_fp8

__all__ = [
    "Status",
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
    "is_packed",
    "moe",
    "moe_fp8",
    "multiplies_fp8",
    "pack_into",
    "pack_weight",
    "packed_rows",
    "packed_shape",
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
    "startup_steps",
    "triton",
    "unpack_weight",
    "use_backend",
    "wants_packed",
    "weight_memory",
]
