"""Named sets of problems: @cpu and @cuda run where no pattern is given, in minutes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from .problems import KV, Value


def _set(template: str, **axes: Sequence[Value]) -> list[str]:
    return [template.format(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]


# The CPU's are sizes that its memory holds.
SETS: dict[str, tuple[str, ...]] = {
    "cpu": (
        *_set("grouped_gemm/{m}/*/w13-{f}-even-t{t}", m=("mixtral-8x22b-quarter", "grok-1-tp8"), f=("int8", "fp8"),
              t=(1, 4, 64, 512, 2048)),
        *_set("grouped_gemm/{m}/*/w13-int8dyn-even-t{t}", m=("mixtral-8x22b-quarter", "grok-1-tp8"), t=(64, 512, 2048)),
        *_set("grouped_gemm/mixtral-8x22b-quarter/*/w13-{f}-even-t{t}",
              f=("int4", "int4_k", "int6_k", "int4_kdyn", "int6_kdyn"), t=(1, 4, 512)),
        *_set("moe/{m}/*/{f}-even-t{t}", m=("mixtral-8x22b-quarter", "grok-1-tp8"), f=("int8", "fp8", "int8dyn"),
              t=(1, 16, 64, 512)),
        *_set("paged_attention/{m}/decode/bf16-p16-b1-l{n}", m=("grok-1-quarter", "grok-1"), n=(4096, 32768)),
        *_set("paged_attention/{m}/prefill/bf16-p16-q512-l{n}", m=("grok-1-quarter", "grok-1"), n=(4096, 32768)),
        *_set("{op}/grok-1/*/t{t}", op=("rms_norm", "sandwich_norm", "route_topk", "quantize_int8"), t=(1, 64, 1024)),
        *_set("rope_store_kv/grok-1/*/bf16-p16-t{t}", t=(1, 64, 1024)),
        *_set("group_tokens/grok-1/*/zipf-t{t}", t=(64, 1024)),
        *_set("sample_top_p/grok-1/decode/b{b}", b=(1, 16)),
    ),
    # the first part of `make bench-gpu`, a minute and a half: the most important first
    "cuda-first": (
        *_set("grouped_gemm/grok-1/prefill/{w}-fp8xfp8-even-t4096", w=("w13", "w2")),
        *_set("moe/grok-1/*/fp8dyn-even-t{t}", t=(1, 4, 64, 4096)),
        *_set("paged_attention/grok-1/decode/{kv}-p64-b64-l8192", kv=KV),
        "route_topk/grok-1/decode/t64", "group_tokens/grok-1/decode/zipf-t256", "sample_top_p/grok-1/decode/b64",
        "paged_attention/grok-1/decode/bf16-p64-b1-l8192", "paged_attention/grok-1/prefill/bf16-p64-q2048-l2048",
        *_set("moe/grok-1/*/int8-even-t{t}", t=(1, 64, 4096)),
        *_set("grouped_gemm/grok-1/*/w13-fp8xfp8-{r}", r=("zipf-t4096", "even-t64")),
        *_set("{op}/grok-1/*/t256", op=("rms_norm", "sandwich_norm", "quantize_fp8")),
        "rope_store_kv/grok-1/*/bf16-p64-t256",
    ),
    # the second part, beside peers that compile
    "cuda-compiling": (
        "grouped_gemm/grok-1/prefill/w2-fp8xfp8-even-t4096", "paged_attention/grok-1/decode/bf16-p64-b64-l8192",
        "grouped_gemm/grok-1/decode/w2-fp8xfp8-even-t64", "paged_attention/grok-1/prefill/bf16-p64-q2048-l2048",
    ),
    # the second part, two minutes: every class once, and what decides between kernels
    "cuda": (
        *_set("grouped_gemm/grok-1/*/{w}-fp8xfp8-even-t{t}", w=("w13", "w2"), t=(1, 64, 4096)),
        "grouped_gemm/grok-1/prefill/w13-fp8xfp8-zipf-t4096", "grouped_gemm/grok-1/decode/w13-bf16-even-t64",
        *_set("grouped_gemm/grok-1/*/w13-int8-even-t{t}", t=(1, 64, 4096)),
        *_set("moe/grok-1/*/fp8dyn-even-t{t}", t=(1, 8, 32, 1024, 4096)),
        *_set("moe/grok-1/*/int8-even-t{t}", t=(1, 32)), "moe_fp8/grok-1/decode/fp8xfp8-even-t32",
        *_set("paged_attention/grok-1/decode/bf16-p64-b{b}-l8192", b=(1, 64)),
        "paged_attention/grok-1/decode/fp8-p64-b64-l8192", "paged_attention/grok-1/prefill/bf16-p64-q2048-l2048",
        *_set("route_topk/grok-1/*/t{t}", t=(1, 256, 4096)), "route_and_group/grok-1/decode/t64",
        "group_tokens/grok-1/prefill/zipf-t16384",
        *_set("{op}/grok-1/*/t256", op=("rms_norm", "sandwich_norm", "sandwich_norm_fp8", "quantize_fp8")),
        "rope_store_kv/grok-1/*/bf16-p64-t256", "sample_top_p/grok-1/decode/b64",
    ),
    "quick": (
        "rms_norm/grok-1/decode/t64", "sandwich_norm/grok-1/decode/t64", "rope_store_kv/grok-1/decode/bf16-p16-t64",
        *_set("paged_attention/grok-1-quarter/decode/{kv}-p16-b1-l4096", kv=KV),
        "paged_attention/grok-1-quarter/prefill/bf16-p16-q128-l1024", "route_topk/grok-1/decode/t64",
        "group_tokens/grok-1/decode/zipf-t64", "quantize_fp8/grok-1/decode/t64", "quantize_int8/grok-1/decode/t64",
        "grouped_gemm/mixtral-8x22b-quarter/decode/w2-int8-even-t4", "moe/mixtral-8x22b-quarter/decode/int8-even-t4",
        "sample_top_p/grok-1/decode/b1",
    ),
}  # fmt: skip
