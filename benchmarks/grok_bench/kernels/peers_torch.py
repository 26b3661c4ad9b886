"""torch's own for each op, on either device: eager, compiled, grouped products, attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .attention import Attend, capped, without_softcap
from .contestant import Call, Contestant, register
from .data import Rows, Weights
from .gemm import Product
from .moe import Layer, composed

Pack = Callable[[Weights], Any]
Run = Callable[[Tensor, Any, Rows], Tensor]  # x (M, K) bf16, packed weights, rows


def add() -> None:
    for op, function in EAGER.items():
        eager = Contestant(name="torch eager", op=op, bind=partial(_call, function))
        compiled = replace(eager, name="torch.compile", bind=partial(_compiled, function), compiles=True)
        register(eager, *(() if op in ("group_tokens", "rope_store_kv") else (compiled,)))
    products("torch _grouped_mm, bf16", Weights.bf16, _grouped_mm, 2)
    register(
        Contestant(
            name="torch _scaled_grouped_mm, a scale a row", op="grouped_gemm", bind=_scaled_grouped_mm,
            devices=("cuda",), formats=("fp8xfp8",), prepares_rows=True,
        )
    )  # fmt: skip
    sdpa = Contestant(
        name="torch sdpa, no pages", op="paged_attention", bind=_sdpa, weight_bytes=2,
        enters=lambda p: p["kv"] == "bf16",
    )  # fmt: skip
    register(replace(sdpa, enters=lambda p: sdpa.enters(p) and not capped(p)), without_softcap(sdpa))
    register(
        Contestant(
            name="torch FlexAttention, no pages", op="paged_attention", bind=_flex, devices=("cuda",), compiles=True,
            weight_bytes=2,
        )
    )  # fmt: skip


def products(
    name: str, pack: Pack, run: Run, weight_bytes: float, *, formats: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu", "cuda"), missing: Callable[[], str] = lambda: "",
) -> None:  # fmt: skip
    """Register a grouped product, and the expert layer composed of two of them. No formats: all."""

    def product(inputs: Product) -> Call:
        return partial(run, inputs.x_MK, inputs.weights.once(name, pack), inputs.rows)

    def layer(inputs: Layer) -> Call:
        w13, w2 = inputs.w13.once(name, pack), inputs.w2.once(name, pack)
        return lambda: composed(run, inputs, w13, w2).to(inputs.x_TD.dtype)

    one = Contestant(
        name=name, op="grouped_gemm", bind=product, devices=devices, formats=formats, missing=missing,
        weight_bytes=weight_bytes,
    )  # fmt: skip
    register(one, replace(one, op="moe", bind=layer))


def loop(linear: Callable[[Tensor, Any], Tensor]) -> Run:
    """A loop over the experts that have rows."""

    def run(x_MK: Tensor, packed: Any, rows: Rows) -> Tensor:
        return torch.cat([linear(x_MK[rows.part(e)], packed[e]) for e in rows.hit])

    return run


def _grouped_mm(x_MK: Tensor, weight_ENK: Tensor, rows: Rows) -> Tensor:
    return torch._grouped_mm(x_MK, weight_ENK.transpose(1, 2), offs=rows.offsets[1:])


def _scaled_grouped_mm(inputs: Product) -> Call:
    x_MK, w = inputs.x_MK, inputs.weights
    q_MK, scale = _quantize(x_MK, x_MK.shape[1], 448.0, torch.float8_e4m3fn)
    return partial(
        torch._scaled_grouped_mm, q_MK, w.values.transpose(1, 2), scale[:, 0], w.scale[:, 0].contiguous(),
        offs=inputs.rows.offsets[1:], out_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


# Attention


def _sdpa(a: Attend) -> Call:
    k, v = a.cache.contiguous()
    q = a.q_THC.unflatten(0, (-1, a.queries)).transpose(1, 2)
    mask = None
    if 1 < a.queries < a.cache.length:
        mask = torch.ones(a.queries, a.cache.length, dtype=torch.bool, device=q.device).tril(a.cache.length - a.queries)
    attend = partial(
        functional.scaled_dot_product_attention, q, k, v, attn_mask=mask,
        is_causal=mask is None and a.queries > 1, scale=a.scale, enable_gqa=True,
    )  # fmt: skip
    return lambda: attend().transpose(1, 2).flatten(0, 1)


def _flex(a: Attend) -> Call:
    """FlexAttention, with softcap and temperature in its score_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length, t = a.cache.length, a.queries
    first = length - t

    def score(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if a.softcap:
            s = a.softcap * torch.tanh(s / a.softcap)
        if a.temperature_len:
            position = (q + first).clamp(min=1).float()
            longer = torch.log2(position) / torch.log2(torch.full_like(position, a.temperature_len))
            s = s * torch.where(position > a.temperature_len, longer, 1.0)
        return s

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + first

    k, v = a.cache.contiguous()
    q = a.q_THC.unflatten(0, (-1, t)).transpose(1, 2)
    device = str(k.device)
    mask = a.cache.once(f"mask {t}", lambda _: create_block_mask(seen, None, None, t, length, device=device))
    flex = _compiled_once(flex_attention)
    attend = partial(flex, q, k, v, score_mod=score, block_mask=mask, scale=a.scale, enable_gqa=True)
    return lambda: attend().transpose(1, 2).flatten(0, 1)


# Row-wise ops in plain torch


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x.float(), x.shape[-1:], weight, eps).to(x.dtype)


def _sandwich_norm(h: Tensor, delta: Tensor, post: Tensor | None, pre: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    h = h + (delta if post is None else _rms_norm(delta, post, eps))
    return h, _rms_norm(h, pre, eps)


def _rope_store_kv(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, slots: Tensor,
    cos_sin: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

    page, place = slots // k_cache.shape[2], slots % k_cache.shape[2]
    for x, cached, scale in ((rotate(k), k_cache, k_scale), (v, v_cache, v_scale)):
        if scale is None:
            cached[page, :, place] = x
            continue
        s = x.float().abs().amax(-1) / 448
        stored = (x.float() / s.unsqueeze(-1)).to(torch.float8_e4m3fn)
        cached.view(torch.uint8)[page, :, place] = stored.view(torch.uint8)  # e4m3 has no indexed store
        scale[page, :, place] = s
    return rotate(q)


def _route_topk(x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool) -> tuple[Tensor, Tensor]:
    logits = x.float() @ router.t()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    weights, experts = torch.softmax(logits, -1).topk(k, dim=-1)
    return weights / weights.sum(-1, keepdim=True) if renormalize else weights, experts.int()


def _group_tokens(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    grouped, order = experts.flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=experts.device)
    return order.int(), torch.searchsorted(grouped, bounds).int()


def _route_and_group(x: Tensor, router: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights, experts = _route_topk(x, router, *rest)
    return weights, experts, *_group_tokens(experts, router.shape[0])


def _quantize(x: Tensor, group: int, most: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(1, (-1, group))
    scale = groups.abs().amax(-1).clamp(min=2.0**-100) / most
    q = groups / scale.unsqueeze(-1)
    return (q.round() if dtype == torch.int8 else q).clamp(-most, most).to(dtype).flatten(1), scale


def _sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    p, order = torch.softmax(logits.float() / temperature[:, None], -1).sort(dim=-1, descending=True, stable=True)
    sums = p.double().cumsum(-1)
    kept = (sums - p < top_p[:, None]).sum(-1, keepdim=True)
    at = torch.searchsorted(sums, uniform.double()[:, None] * sums.gather(1, kept - 1), right=True)
    return order.gather(1, torch.minimum(at, kept - 1))[:, 0]


EAGER: dict[str, Callable[..., Any]] = {
    "rms_norm": _rms_norm,
    "sandwich_norm": _sandwich_norm,
    "rope_store_kv": _rope_store_kv,
    "route_topk": _route_topk,
    "group_tokens": _group_tokens,
    "route_and_group": _route_and_group,
    "quantize_fp8": partial(_quantize, most=448.0, dtype=torch.float8_e4m3fn),
    "quantize_int8": partial(_quantize, most=127.0, dtype=torch.int8),
    "sample_top_p": _sample_top_p,
}


def _call(function: Callable[..., Any], inputs: Any) -> Call:
    return partial(function, *inputs.args)


_compiled_once = cache(lambda function: torch.compile(function, dynamic=False))


def _compiled(function: Callable[..., Any], inputs: Any) -> Call:
    return partial(_compiled_once(function), *inputs.args)
