"""Other people's kernels on a GPU: DeepGEMM and FlashInfer, where they are installed.

Written by their published interfaces and tested with stand-ins; on the chip they have not been timed yet. One whose
interface has changed is reported as failed, with what it raised.
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
from .problems import Problem


def _deep_gemm() -> Any:
    import deep_gemm

    return deep_gemm


def _flashinfer() -> Any:
    import flashinfer

    return flashinfer


PACKAGES = {  # its name, how to get it, and its import
    "deep_gemm": ("DeepGEMM", "pip install sgl-deep-gemm==0.1.4.post1 apache-tvm-ffi==0.1.11", _deep_gemm),
    "flashinfer": ("FlashInfer", "pip install flashinfer-python", _flashinfer),
}
WORKSPACE = 256 << 20  # bytes, FlashInfer's own


def add() -> None:
    for package, what, op, bind, enters in (
        ("deep_gemm", "fp8, contiguous", "grouped_gemm", _contiguous, _takes("fp8xfp8")),
        ("deep_gemm", "fp8, masked", "grouped_gemm", _masked, _takes("fp8xfp8")),
        ("flashinfer", "decode", "paged_attention", _flashinfer_decode, _pages("decode")),
        ("flashinfer", "prefill", "paged_attention", _flashinfer_prefill, _pages("prefill")),
    ):
        register(
            Contestant(
                name=f"{PACKAGES[package][0]} {what}", op=op, bind=bind, devices=("cuda",), enters=enters,
                missing=partial(missing, package), compiles=True,
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
    """bf16 alone: no peer has a scale for each token and head."""
    return lambda p: p.family.phase == phase and p["kv"] == "bf16" and not p.shape.attn_temperature_len


# DeepGEMM: scales of rows for each group of 128, of weights for each block of 128 × 128


def _blocks(weights: Weights) -> Tensor:
    """Scales (E, N / 128, K / 128): ours are the same within a block of outputs, and along the inputs."""
    assert weights.scale is not None
    groups = -(-weights.values.shape[2] // BLOCK)
    return weights.scale[:, 0, ::BLOCK, None].expand(-1, -1, groups).contiguous()


def _contiguous(inputs: Product) -> Call:
    """Each expert's rows start at a multiple of the alignment; the padding between belongs to no expert."""
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
    """Each expert has room for the largest group."""
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
    """The plan is made once, untimed, as it serves all the layers of a step."""
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
