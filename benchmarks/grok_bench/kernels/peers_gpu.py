"""Other people's kernels on a GPU: DeepGEMM, FlashInfer, vLLM and sgl-kernel, where they are installed.

Written by their published interfaces, which move from release to release, and not yet run on a chip: one that has
changed is reported as failed, with what it raised.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .attention import Attend
from .contestant import Call, Contestant, register
from .data import BLOCK, Weights
from .gemm import Product
from .moe import Layer
from .problems import Problem


def _deep_gemm() -> Any:
    import deep_gemm

    return deep_gemm


def _flashinfer() -> Any:
    import flashinfer

    return flashinfer


def _flashinfer_norm() -> Any:
    import flashinfer.norm

    return flashinfer.norm


def _sgl_kernel() -> Any:
    import sgl_kernel

    return sgl_kernel


def _vllm() -> Any:
    import vllm._custom_ops

    return vllm._custom_ops


# What it is called, how to get it, and what shows that it can be had.
PACKAGES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "deep_gemm": ("DeepGEMM", "pip install sgl-deep-gemm==0.1.4.post1 apache-tvm-ffi==0.1.11", _deep_gemm),
    "flashinfer": ("FlashInfer", "pip install flashinfer-python", _flashinfer),
    "vllm": ("vLLM", "pip install vllm", _vllm),
    "sgl_kernel": ("sgl-kernel", "pip install sgl-kernel", _sgl_kernel),
}
COMPILED = ("deep_gemm", "flashinfer")  # just in time, by nvcc
FP8_MOST, WORKSPACE = 448.0, 256 << 20


def add() -> None:
    peer("deep_gemm", "fp8, contiguous", "grouped_gemm", _contiguous, _takes("fp8xfp8"))
    peer("deep_gemm", "fp8, masked", "grouped_gemm", _masked, _takes("fp8xfp8"))
    peer("flashinfer", "decode", "paged_attention", _flashinfer_decode, _pages("decode"))
    peer("flashinfer", "prefill", "paged_attention", _flashinfer_prefill, _pages("prefill"))
    for package in ("flashinfer", "sgl_kernel"):
        peer(package, "rmsnorm", "rms_norm", partial(_rms_norm, package))
        peer(
            package, "fused_add_rmsnorm", "sandwich_norm", partial(_add_norm, package), lambda p: not p.shape.post_norms
        )
    peer("sgl_kernel", "topk_softmax", "route_topk", _sgl_topk, lambda p: not p.shape.router_softcap)
    for op, dtype, most in (("quantize_fp8", torch.float8_e4m3fn, FP8_MOST), ("quantize_int8", torch.int8, 127.0)):
        peer("sgl_kernel", "per_token_group_quant_8bit", op, partial(_sgl_quantize, dtype, most))
    peer("vllm", "rms_norm", "rms_norm", _vllm_norm)
    peer("vllm", "topk_softmax", "route_topk", _vllm_topk, lambda p: not p.shape.router_softcap)
    peer("vllm", "per_token_group_quant_fp8", "quantize_fp8", _vllm_quantize)
    for fmt in ("bf16", "fp8dyn", "int8"):
        peer("vllm", "fused_experts", "moe", _vllm_experts, _takes(fmt), suffix=f", {fmt}")


def peer(
    package: str, what: str, op: str, bind: Callable[[Any], Call], enters: Callable[[Problem], bool] = lambda p: True,
    suffix: str = "",
) -> None:  # fmt: skip
    register(
        Contestant(
            name=f"{PACKAGES[package][0]} {what}{suffix}", op=op, bind=bind, devices=("cuda",), enters=enters,
            missing=partial(missing, package), compiles=package in COMPILED,
        )
    )  # fmt: skip


@cache
def missing(package: str) -> str:
    name, how, load = PACKAGES[package]
    if importlib.util.find_spec(package) is None:
        return f"{name} is not installed: {how}"
    try:
        load()
    except Exception as error:  # a build for another torch or CUDA raises what it likes
        reason = (str(error).splitlines() or [""])[0]
        return f"{name} does not load ({type(error).__name__}: {reason}): {how}"
    return ""


def _takes(fmt: str) -> Callable[[Problem], bool]:
    return lambda p: p["format"] == fmt


def _pages(phase: str) -> Callable[[Problem], bool]:
    """Of bf16: a scale for each token and head is nobody else's."""
    return lambda p: p.family.phase == phase and p["kv"] == "bf16" and not p.shape.attn_temperature_len


# DeepGEMM: scales of rows for each group of 128, of weights for each block of 128 × 128


def _blocks(weights: Weights) -> Tensor:
    """Scales (E, N / 128, K / 128): ours are the same within a block of outputs, and along the inputs."""
    assert weights.scale is not None
    groups = -(-weights.values.shape[2] // BLOCK)
    return weights.scale[:, 0, ::BLOCK, None].expand(-1, -1, groups).contiguous()


def _contiguous(inputs: Product) -> Call:
    """Each expert's rows begin at a multiple of its block of rows; rows in between belong to none."""
    dg, rows = _deep_gemm(), inputs.rows
    assert inputs.quantized is not None
    block = int(dg.get_mk_alignment_for_contiguous_layout())
    counts = [b - a for a, b in zip(rows.bounds, rows.bounds[1:], strict=False)]
    padded = [-(-n // block) * block for n in counts]
    device = inputs.x_MK.device
    owner = torch.full((sum(padded),), -1, dtype=torch.int32, device=device)
    at = torch.empty(rows.total, dtype=torch.long, device=device)
    start = 0
    for e, (n, room) in enumerate(zip(counts, padded, strict=True)):
        owner[start : start + n] = e
        at[rows.part(e)] = torch.arange(start, start + n, device=device)
        start += room
    q, scale = inputs.quantized
    x = torch.zeros(sum(padded), q.shape[1], dtype=q.dtype, device=device)
    x.view(torch.uint8)[at] = q.view(torch.uint8)
    sx = torch.ones(sum(padded), scale.shape[1], device=device)
    sx[at] = scale
    weight = inputs.weights.once("DeepGEMM", lambda w: (w.values, _blocks(w)))
    out = torch.empty(sum(padded), inputs.weights.values.shape[1], dtype=torch.bfloat16, device=device)

    def run() -> Call:
        dg.m_grouped_fp8_gemm_nt_contiguous((x, sx), weight, out, owner)
        return lambda: out[at]

    return run


def _masked(inputs: Product) -> Call:
    """A room for each expert as large as the largest group."""
    dg, rows = _deep_gemm(), inputs.rows
    assert inputs.quantized is not None
    e, n, k = inputs.weights.values.shape
    counts = torch.tensor([b - a for a, b in zip(rows.bounds, rows.bounds[1:], strict=False)], dtype=torch.int32)
    room = -(-int(counts.max()) // 64) * 64
    device = inputs.x_MK.device
    at = torch.cat([torch.arange(i * room, i * room + int(c)) for i, c in enumerate(counts)]).to(device)
    q, scale = inputs.quantized
    x = torch.zeros(e * room, k, dtype=q.dtype, device=device)
    x.view(torch.uint8)[at] = q.view(torch.uint8)
    sx = torch.ones(e * room, scale.shape[1], device=device)
    sx[at] = scale
    weight = inputs.weights.once("DeepGEMM", lambda w: (w.values, _blocks(w)))
    out = torch.empty(e, room, n, dtype=torch.bfloat16, device=device)
    run = getattr(dg, "m_grouped_fp8_gemm_nt_masked", None) or dg.fp8_m_grouped_gemm_nt_masked
    expected = max(1, rows.total // e)
    masked = counts.to(device)

    def call() -> Call:
        run((x.view(e, room, k), sx.view(e, room, -1)), weight, out, masked, expected)
        return lambda: out.flatten(0, 1)[at]

    return call


# FlashInfer


def _planned(wrapper: str, a: Attend, plan: Callable[[Any, tuple[Tensor, ...]], None]) -> Call:
    """`plan` is made here, once, as for all the layers of a step."""
    cache = a.cache
    batch, each = cache.table.shape
    page = cache.k_pages.shape[2]
    device = a.q_THC.device
    made = getattr(_flashinfer(), wrapper)
    buffer = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    indptr = torch.arange(0, batch * each + 1, each, dtype=torch.int32, device=device)
    last = torch.full((batch,), cache.length - (each - 1) * page, dtype=torch.int32, device=device)
    pages = cache.table.flatten()
    if "Decode" in wrapper:  # the heads that share keys make a tile
        one = made(
            buffer, "HND", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=indptr.clone(),
            paged_kv_indices_buffer=pages.clone(), paged_kv_last_page_len_buffer=last.clone(),
        )  # fmt: skip
    else:
        one = made(buffer, "HND")
    plan(one, (indptr, pages, last))
    return partial(one.run, a.q_THC, (cache.k_pages, cache.v_pages))


def _sizes(a: Attend) -> tuple[int, int, int, int]:
    _, groups, page, c = a.cache.k_pages.shape
    return a.q_THC.shape[1], groups, c, page


def _flashinfer_decode(a: Attend) -> Call:
    def plan(wrapper: Any, pages: tuple[Tensor, ...]) -> None:
        wrapper.plan(
            *pages, *_sizes(a), q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16, sm_scale=a.scale,
            logits_soft_cap=a.softcap or None,
        )  # fmt: skip

    return _planned("BatchDecodeWithPagedKVCacheWrapper", a, plan)


def _flashinfer_prefill(a: Attend) -> Call:
    def plan(wrapper: Any, pages: tuple[Tensor, ...]) -> None:
        wrapper.plan(
            a.starts, *pages, *_sizes(a), causal=True, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
            sm_scale=a.scale, logits_soft_cap=a.softcap or None,
        )  # fmt: skip

    return _planned("BatchPrefillWithPagedKVCacheWrapper", a, plan)


# Norms, routing and quantising


def _rms_norm(package: str, inputs: Any) -> Call:
    x, weight, eps = inputs.args
    module = _flashinfer_norm() if package == "flashinfer" else _sgl_kernel()
    return partial(module.rmsnorm, x, weight.to(x.dtype), eps)


def _add_norm(package: str, inputs: Any) -> Call:
    """It writes over both of its inputs, which are copies here."""
    h, delta, _, weight, eps = inputs.args
    module = _flashinfer_norm() if package == "flashinfer" else _sgl_kernel()
    residual, y, weight = h.clone(), delta.clone(), weight.to(h.dtype)

    def run() -> tuple[Tensor, Tensor]:
        module.fused_add_rmsnorm(y, residual, weight, eps)
        return residual, y

    return run


def _vllm_norm(inputs: Any) -> Call:
    x, weight, eps = inputs.args
    ops, out, weight = _vllm(), torch.empty_like(x), weight.to(x.dtype)

    def run() -> Tensor:
        ops.rms_norm(out, x, weight, eps)
        return out

    return run


def _topk(inputs: Any, gate: Callable[[Tensor, Tensor, Tensor, bool], None]) -> Call:
    """The product in torch, and theirs from there."""
    x, router, k, _, renormalize = inputs.args
    weights = torch.empty(x.shape[0], k, device=x.device)
    experts = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)

    def run() -> tuple[Tensor, Tensor]:
        gate(weights, experts, x.float() @ router.t(), renormalize)
        return weights, experts

    return run


def _sgl_topk(inputs: Any) -> Call:
    return _topk(inputs, lambda w, e, logits, renormalize: _sgl_kernel().topk_softmax(w, e, logits, renormalize))


def _vllm_topk(inputs: Any) -> Call:
    ops = _vllm()
    t, k = inputs.args[0].shape[0], inputs.args[2]
    source = torch.empty(t, k, dtype=torch.int32, device=inputs.args[0].device)
    return _topk(inputs, lambda w, e, logits, renormalize: ops.topk_softmax(w, e, source, logits, renormalize))


def _sgl_quantize(dtype: torch.dtype, most: float, inputs: Any) -> Call:
    x, group = inputs.args
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(x.shape[0], x.shape[1] // group, device=x.device)
    function = _sgl_kernel().sgl_per_token_group_quant_8bit

    def run() -> tuple[Tensor, Tensor]:
        function(x, q, scale, group, 1e-10, -most, most)
        return q, scale

    return run


def _vllm_quantize(inputs: Any) -> Call:
    from vllm.model_executor.layers.quantization.utils.fp8_utils import per_token_group_quant_fp8

    return partial(per_token_group_quant_fp8, *inputs.args)


# vLLM's expert layer


def _vllm_experts(layer: Layer) -> Call:
    """Since 0.11 the scales come in a configuration; weights are as ours are."""
    from vllm.model_executor.layers.fused_moe import config, fused_experts

    options: dict[str, Any] = {"inplace": False, "activation": _vllm_activation(layer.activation)}
    if layer.fmt == "fp8dyn":
        scales = [w.once("blocks", _blocks) for w in (layer.w13, layer.w2)]
        options["quant_config"] = config.fp8_w8a8_moe_quant_config(*scales, block_shape=[BLOCK, BLOCK])
    elif layer.fmt == "int8":
        scales = [w.scale[:, 0] for w in (layer.w13, layer.w2) if w.scale is not None]
        options["quant_config"] = config.int8_w8a16_moe_quant_config(*scales, None, None)
    return partial(
        fused_experts,
        layer.x_TD,
        layer.w13.values,
        layer.w2.values,
        layer.topk_weights,
        layer.experts,
        **options,
    )


def _vllm_activation(name: str) -> Any:
    """In newer releases a member of an enumeration."""
    try:
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    except ModuleNotFoundError:
        return name
    return MoEActivation(name)
