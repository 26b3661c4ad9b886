"""The ops: what each computes, takes, returns and refuses is in its docstring, which every backend is tested against.

`reference/` holds the definitions in plain torch. The ops live in torch's namespace `grok::`, so that they trace and
compile. Activations are flat, (T, ...): T tokens of whatever requests, fp32 or bf16. Weights are `Weight` objects of
K-major matrices (E, N, K), one an expert. Index tensors are int32; their values are checked only where an op says so.
Every wrong argument raises a ValueError that names it, its value and what was expected. Where an input requires grad
the reference runs, and is differentiable.
"""

from .attention import paged_attention, rope_store_kv, rope_table
from .norms import rms_norm, sandwich_norm, sandwich_norm_fp8
from .products import grouped_gemm, moe, moe_fp8
from .quantize import quantize_fp8, quantize_int8
from .routing import group_tokens, route_and_group, route_topk
from .sampling import sample_top_p

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
    "rope_table",
    "route_and_group",
    "route_topk",
    "sample_top_p",
    "sandwich_norm",
    "sandwich_norm_fp8",
]
