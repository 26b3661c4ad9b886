"""Rotary embedding, and attention over paged keys and values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..registry import register
from .quantize import quantize_fp8

QUERY_BLOCK = 256  # bounds the scores held at once


def rotate(x_TNC: Tensor, cos_sin_TC: Tensor) -> Tensor:
    """Each half of C turned against the other, in fp32."""
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
        # e4m3 has no indexed store: the same bytes go in as uint8
        cache.view(torch.uint8)[page, :, place] = q.view(torch.uint8).view(x.shape)
        scale[page, :, place] = s.view(x.shape[:2])
    return rotate(q_THC, cos_sin_TC)


def _gather(cache: Tensor, scale: Tensor | None, pages: Tensor, length: int) -> Tensor:
    """One request's keys or values, (G, length, C) fp32. Places past `length` are dropped unread."""
    x = cache[pages].float()
    if scale is not None:
        x = x * scale[pages].unsqueeze(-1)
    return x.transpose(0, 1).flatten(1, 2)[:, :length]


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
        q = q_THC[starts[b] : starts[b + 1]]
        pages = block_table[b, : -(-length // k_cache.shape[2])].long()
        k_GLC = _gather(k_cache, k_scale, pages, length)
        v_GLC = _gather(v_cache, v_scale, pages, length)
        first = length - q.shape[0]
        for start in range(0, q.shape[0], QUERY_BLOCK):
            block = q[start : start + QUERY_BLOCK]
            positions = torch.arange(first + start, first + start + block.shape[0], device=q.device)
            parts.append(_attend(block, k_GLC, v_GLC, positions, scale, softcap, window, temperature_len))
    return torch.cat(parts).to(q_THC.dtype) if parts else torch.zeros_like(q_THC)


def _attend(
    q_NHC: Tensor,
    k_GLC: Tensor,
    v_GLC: Tensor,
    positions_N: Tensor,
    scale: float,
    softcap: float,
    window: int,
    temperature_len: int,
) -> Tensor:
    n, heads, c = q_NHC.shape
    groups, length, _ = k_GLC.shape
    q = q_NHC.float().view(n, groups, heads // groups, c).permute(1, 2, 0, 3).flatten(1, 2)  # (G, R·N, C)
    s = (q @ k_GLC.transpose(1, 2)).view(groups, heads // groups, n, length) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if temperature_len:
        factor = torch.log2(positions_N.clamp(min=1).float()) / math.log2(temperature_len)
        s = s * torch.where(positions_N > temperature_len, factor, 1.0)[:, None]
    keys_L = torch.arange(length, device=s.device)
    seen = keys_L <= positions_N[:, None]
    if window:
        seen &= keys_L > positions_N[:, None] - window
    p = torch.softmax(s.masked_fill(~seen, -math.inf), -1).flatten(1, 2)
    return (p @ v_GLC).view(groups, heads // groups, n, c).permute(2, 0, 1, 3).reshape(n, heads, c)
