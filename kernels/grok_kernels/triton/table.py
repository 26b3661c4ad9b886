"""The backend's function for every op, by the op's name. Importing this imports Triton."""

from .attention import paged_attention
from .gemm import grouped_gemm
from .moe import moe, moe_fp8
from .norm import rms_norm, sandwich_norm, sandwich_norm_fp8
from .quantize import quantize_fp8, quantize_int8
from .rope import rope_store_kv
from .route import group_tokens, route_and_group, route_topk
from .sample import sample_top_p

__all__ = [
    "group_tokens",
    "grouped_gemm",
    "moe",
    "moe_fp8",
    "paged_attention",
    "quantize_fp8",
    "quantize_int8",
    "rms_norm",
    "rope_store_kv",
    "route_and_group",
    "route_topk",
    "sample_top_p",
    "sandwich_norm",
    "sandwich_norm_fp8",
]
