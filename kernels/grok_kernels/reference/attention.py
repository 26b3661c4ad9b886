"""Rotary embedding, and attention over paged keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from ..registry import register
from .quantize import quantize_fp8

QUERIES, KEYS = 16, 64  # one fixed block shape, so that a query's bits do not depend on its batch
QUERY_BLOCKS = 16  # at once, which bounds the memory for scores


def rotate(x_TNC: Tensor, cos_sin_TC: Tensor) -> Tensor:
    """The half-rotation of `rope_store_kv`, in fp32."""
    cos, sin = cos_sin_TC.unsqueeze(1).chunk(2, dim=-1)
    x1, x2 = x_TNC.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x_TNC.dtype)


@register("rope_store_kv", "reference")
def rope_store_kv(
    q_THC: Tensor,
    k_TGC: Tensor,
    v_TGC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions_T: Tensor,
    slots_T: Tensor,
    cos_sin: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    cos_sin_TC = cos_sin[positions_T.long()]
    kept = slots_T >= 0
    slots = slots_T[kept].long()
    page, place = slots // k_cache.shape[2], slots % k_cache.shape[2]
    for x_TGC, cache, scale in ((rotate(k_TGC, cos_sin_TC), k_cache, k_scale), (v_TGC, v_cache, v_scale)):
        x = x_TGC[kept]
        if scale is None:
            cache[page, :, place] = x.to(cache.dtype)
            continue
        q, s = quantize_fp8(x.flatten(0, 1), 0)
        # torch has no indexed store of e4m3: the same bytes are stored as uint8
        cache.view(torch.uint8)[page, :, place] = q.view(torch.uint8).view(x.shape)
        scale[page, :, place] = s.view(x.shape[:2])
    return rotate(q_THC, cos_sin_TC)


def _gather(cache: Tensor, scale: Tensor | None, pages: Tensor, length: int) -> Tensor:
    """One request's keys or values, (G, length, C) fp32, padded with zeros to a multiple of KEYS. Nothing past `length`
    in the last page reaches the result."""
    x = cache[pages].float()
    if scale is not None:
        x = x * scale[pages].unsqueeze(-1)
    return functional.pad(x.transpose(0, 1).flatten(1, 2)[:, :length], (0, 0, 0, -length % KEYS))


@register("paged_attention", "reference")
def paged_attention(
    q_THC: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    softcap: float,
    window: int,
    temperature_len: int,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    starts, lengths = query_start.tolist(), seq_lens.tolist()
    parts = []
    for b, length in enumerate(lengths):
        q = q_THC[starts[b] : starts[b + 1]].float()
        pages = block_table[b, : -(-length // k_cache.shape[2])].long()
        k_GLC = _gather(k_cache, k_scale, pages, length)
        v_GLC = _gather(v_cache, v_scale, pages, length)
        first = length - q.shape[0]
        for at in range(0, q.shape[0], QUERIES * QUERY_BLOCKS):
            block = q[at : at + QUERIES * QUERY_BLOCKS]
            parts.append(_attend(block, first + at, k_GLC, v_GLC, scale, softcap, window, temperature_len))
    return torch.cat(parts).to(q_THC.dtype) if parts else torch.zeros_like(q_THC)


def _attend(
    q_NHC: Tensor,
    first: int,
    k_GLC: Tensor,
    v_GLC: Tensor,
    scale: float,
    softcap: float,
    window: int,
    temperature_len: int,
) -> Tensor:
    """Queries at positions first, first + 1, ...: one pass over the keys with a running maximum and sum (online
    softmax).

    A block of keys that is masked for a query adds exact zeros, so the number of such blocks changes no bit.
    """
    n, heads, c = q_NHC.shape
    groups = k_GLC.shape[0]
    per_group = heads // groups
    q = functional.pad(q_NHC, (0, 0, 0, 0, 0, -n % QUERIES)).unflatten(0, (-1, QUERIES))  # (B, QUERIES, H, C)
    q = q.unflatten(2, (groups, per_group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B, G, R · QUERIES, C)
    positions_BQ = torch.arange(first, first + q.shape[0] * QUERIES, device=q.device).view(-1, QUERIES)
    positions = positions_BQ.repeat(1, per_group)[:, None, :, None]
    factor = None
    if temperature_len:
        factor = torch.log2(positions.clamp(min=1).float()) / math.log2(temperature_len)
        factor = torch.where(positions > temperature_len, factor, 1.0)
    top = q.new_full((*q.shape[:3], 1), -math.inf)
    total = q.new_zeros(top.shape)
    out = torch.zeros_like(q)
    lowest = max(0, first - window + 1) // KEYS * KEYS if window else 0
    for at in range(lowest, first + n, KEYS):
        s = q @ k_GLC[:, at : at + KEYS].transpose(1, 2) * scale
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        if factor is not None:
            s = s * factor
        keys = torch.arange(at, at + KEYS, device=q.device)
        seen = keys <= positions
        if window:
            seen = seen & (keys > positions - window)
        s = s.masked_fill(~seen, -math.inf)
        new_top = torch.maximum(top, s.detach().amax(-1, keepdim=True))
        shift = torch.where(new_top == -math.inf, 0.0, new_top)  # nothing seen yet: exp(-inf - 0) is 0, not NaN
        p, keep = torch.exp(s - shift), torch.exp(top - shift)
        total = total * keep + p.sum(-1, keepdim=True)
        out = out * keep + p @ v_GLC[:, at : at + KEYS]
        top = new_top
    out = out / total.clamp(min=0.5)  # at least 1 wherever something was seen; 0 in rows that are only padding
    out_BQGRC = out.unflatten(2, (per_group, QUERIES)).permute(0, 3, 1, 2, 4)
    return torch.flatten(out_BQGRC, 0, 1)[:n].reshape(n, heads, c)
