"""Rotates q and k and writes k and v into their pages, in one launch for all heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import jit, launch
from .quantize import as_known, quantized

HEADS = 8  # of one program


@triton.jit
def _rotated(x_ptr, at, half, inside, cos, sin):
    """Both halves of the rotated rows, rounded to x's type, in fp32."""
    x1 = tl.load(x_ptr + at, mask=inside, other=0.0)
    x2 = tl.load(x_ptr + at + half, mask=inside, other=0.0)
    dtype = x1.dtype
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return y1.to(dtype).to(tl.float32), y2.to(dtype).to(tl.float32)


@triton.jit
def _store(cache_ptr, scale_ptr, x1, x2, at, scale_at, half, inside, heads_inside, QUANTIZED: tl.constexpr):
    dtype = cache_ptr.dtype.element_ty
    if QUANTIZED:
        both = tl.reshape(tl.join(x1, x2), (x1.shape[0], 2 * x1.shape[1]))
        q, scale = quantized(both, 448.0, dtype)
        tl.store(scale_ptr + scale_at, scale, mask=heads_inside)
        x1, x2 = tl.split(tl.reshape(q, (x1.shape[0], x1.shape[1], 2)))
    tl.store(cache_ptr + at, x1.to(dtype), mask=inside)
    tl.store(cache_ptr + at + half, x2.to(dtype), mask=inside)


@jit(unaligned=("positions_ptr", "slots_ptr"))
def _rope_store_kv(
    q_ptr, k_ptr, v_ptr, out_ptr, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr,
    positions_ptr, slots_ptr, cos_sin_ptr, heads, groups, c, page,
    q_row, q_head, k_row, k_head, v_row, v_head, k_page, k_group, k_slot, v_page, v_group, v_slot,
    ks_page, ks_group, ks_slot, vs_page, vs_group, vs_slot, table_row,
    QUANTIZED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = c // 2
    column = tl.arange(0, HALF)[None, :]
    q_blocks = tl.cdiv(heads, HEADS)
    row = tl.load(positions_ptr + token).to(tl.int64) * table_row
    cos = tl.load(cos_sin_ptr + row + column, mask=column < half, other=0.0)
    sin = tl.load(cos_sin_ptr + row + half + column, mask=column < half, other=0.0)
    if block < q_blocks:
        head = block * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (column < half)
        y1, y2 = _rotated(q_ptr, token * q_row + head * q_head + column, half, inside, cos, sin)
        at = (token * heads + head) * c + column
        tl.store(out_ptr + at, y1.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out_ptr + at + half, y2.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        own = (block - q_blocks) * HEADS + tl.arange(0, HEADS)
        head = own[:, None]
        slot = tl.load(slots_ptr + token).to(tl.int64)
        stored = tl.where(slot >= 0, groups, 0)  # heads to store: none where the slot is -1
        inside = (head < stored) & (column < half)
        where, place = slot // page, slot % page
        k1, k2 = _rotated(k_ptr, token * k_row + head * k_head + column, half, inside, cos, sin)
        at = where * k_page + head * k_group + place * k_slot + column
        scale_at = where * ks_page + own * ks_group + place * ks_slot
        _store(k_cache_ptr, k_scale_ptr, k1, k2, at, scale_at, half, inside, own < stored, QUANTIZED)
        v_at = token * v_row + head * v_head + column
        v1 = tl.load(v_ptr + v_at, mask=inside, other=0.0).to(tl.float32)
        v2 = tl.load(v_ptr + v_at + half, mask=inside, other=0.0).to(tl.float32)
        at = where * v_page + head * v_group + place * v_slot + column
        scale_at = where * vs_page + own * vs_group + place * vs_slot
        _store(v_cache_ptr, v_scale_ptr, v1, v2, at, scale_at, half, inside, own < stored, QUANTIZED)


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
    (t, heads, c), groups = q_THC.shape, k_TGC.shape[1]
    out_THC = q_THC.new_empty(q_THC.shape)
    ks, vs = (k_cache, v_cache) if k_scale is None or v_scale is None else (k_scale, v_scale)
    launch(
        _rope_store_kv, (t, triton.cdiv(heads, HEADS) + triton.cdiv(groups, HEADS)),
        q_THC, k_TGC, v_TGC, out_THC, as_known(k_cache), as_known(v_cache), ks, vs,
        positions_T, slots_T, cos_sin, heads, groups, c, k_cache.shape[2],
        *q_THC.stride()[:2], *k_TGC.stride()[:2], *v_TGC.stride()[:2], *k_cache.stride()[:3],
        *v_cache.stride()[:3], *ks.stride()[:3], *vs.stride()[:3], cos_sin.stride(0),
        QUANTIZED=k_scale is not None, HEADS=HEADS, HALF=triton.next_power_of_2(max(c // 2, 1)), num_warps=4,
    )  # fmt: skip
    return out_THC
