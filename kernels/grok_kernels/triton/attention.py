"""Causal attention over paged keys and values: prefill, decode and mixed batches by one chain of additions.

A tile holds a few queries with all heads that share a key head, so that one load of a key serves them all; its shape
depends on the model alone. Keys lie in blocks, and blocks in splits, at fixed places: each split has its own running
maximum, sum and output, and splits merge from the first to the last. Where every request has one query, splits are
programs of their own and a second kernel merges them; else one program goes through them. The two do the same
operations in the same order, without fusing multiply and add, so a token's bits depend on neither batch nor chunk.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import tanh
from .gemm import as_type
from .launch import launch
from .quantize import as_known

ROWS = 64  # of a tile: queries times heads of a group; the side of a warpgroup's product
KEYS = 64
SPLIT = 16  # blocks of keys
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _safe(top):
    """A maximum to subtract: 0 where nothing was seen, so that exp2(-inf - it) is 0 and not NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _merge(top, total, out, top2, total2, out2):
    """Two splits as one. One that saw nothing (-inf, 0, 0) changes no bit of the other."""
    new = tl.maximum(top, top2)
    a, b = tl.exp2(top - _safe(new)), tl.exp2(top2 - _safe(new))
    return new, total * a + total2 * b, out * a[:, None] + out2 * b[:, None]


@triton.jit
def _split(
    q, first, end, position, seen_from, k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, page,
    k_page, k_slot, v_page, v_slot, ks_page, ks_slot, vs_page, vs_slot, c, scale, softcap, factor,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Keys first..end−1 of one request: maximum, sum and output of each row, over those that it sees."""
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, HEAD), tl.float32)
    column = tl.arange(0, HEAD)
    for at in range(first, end, KEYS):
        key = at + tl.arange(0, KEYS)
        inside = key < end
        where = tl.load(table_ptr + key // page, mask=inside, other=0).to(tl.int64)
        place = key % page
        k_at = (where * k_page + place * k_slot)[None, :] + column[:, None]
        k = tl.load(k_ptr + k_at, mask=inside[None, :] & (column < c)[:, None], other=0.0)
        s = tl.dot(q, as_type(k, DOT), input_precision="ieee")
        if SCALED:
            s = s * tl.load(ks_ptr + where * ks_page + place * ks_slot, mask=inside, other=0.0)[None, :]
        s = s * scale
        if SOFTCAP:
            s = softcap * tanh(s / softcap)
        s = s * factor[:, None] * LOG2E
        seen = inside[None, :] & (key[None, :] <= position[:, None]) & (key[None, :] >= seen_from[:, None])
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        nans = tl.max((s != s).to(tl.int32), 1) > 0  # which a maximum passes over
        new = tl.where(nans, float("nan"), new)
        keep = tl.exp2(top - _safe(new))
        p = tl.exp2(s - _safe(new)[:, None])
        total = total * keep + tl.sum(p, 1)
        v_at = (where * v_page + place * v_slot)[:, None] + column[None, :]
        v = as_type(tl.load(v_ptr + v_at, mask=inside[:, None] & (column < c)[None, :], other=0.0), DOT)
        if SCALED:
            p = p * tl.load(vs_ptr + where * vs_page + place * vs_slot, mask=inside, other=0.0)[None, :]
        high = p.to(DOT)
        part = tl.dot(high, v, input_precision="ieee")
        if tl.bfloat16 == DOT:  # what bf16 leaves of p, so that the sum is nearly that of fp32
            part += tl.dot((p - high.to(tl.float32)).to(DOT), v, input_precision="ieee")
        out = out * keep[:, None] + part
        top = new
    return top, total, out


@triton.jit
def _attend(
    q_ptr, out_ptr, part_ptr, k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, starts_ptr, lengths_ptr, requests, page,
    heads, per_group, c, table_row, q_row, q_head, k_page, k_group, k_slot, v_page, v_group, v_slot,
    ks_page, ks_group, ks_slot, vs_page, vs_group, vs_slot, scale, softcap, window, temperature_len, log2_len,
    PARTS: tl.constexpr, SOFTCAP: tl.constexpr, WARM: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
    QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr, HEAD: tl.constexpr,
    REQUESTS: tl.constexpr,
):  # fmt: skip
    tile, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # whose tile it is: requests have as many as their queries fill, in turn
    request = tl.arange(0, REQUESTS)
    mask = request < requests
    n = tl.load(starts_ptr + request + 1, mask=mask, other=0) - tl.load(starts_ptr + request, mask=mask, other=0)
    tiles = (n + QUERIES - 1) // QUERIES
    ends = tl.cumsum(tiles, 0)
    if tile < tl.max(ends):
        b = tl.sum((ends <= tile).to(tl.int32))
        own = request == b
        query = (tile - tl.sum(tl.where(own, ends - tiles, 0))) * QUERIES
        start = tl.load(starts_ptr + b)
        count = tl.load(starts_ptr + b + 1) - start
        length = tl.load(lengths_ptr + b)
        row = tl.arange(0, ROWS)
        per_query = ROWS // QUERIES
        index, head = query + row // per_query, row % per_query
        used = (index < count) & (head < per_group)
        position = length - count + index
        seen_from = tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)
        factor = tl.full((ROWS,), 1.0, tl.float32)
        if WARM:
            warm = tl.div_rn(tl.log2(tl.maximum(position, 1).to(tl.float32)), factor * log2_len)
            factor = tl.where(position > temperature_len, warm, 1.0)
        column = tl.arange(0, HEAD)
        token = (start + index).to(tl.int64)
        head = group * per_group + head
        q_at = (token * q_row + head * q_head)[:, None] + column[None, :]
        wide = used[:, None] & (column < c)[None, :]
        q = as_type(tl.load(q_ptr + q_at, mask=wide, other=0.0), DOT)
        low = tl.where(window > 0, tl.maximum(length - count + query - window + 1, 0), 0) // SPAN
        high = tl.minimum(length - count + query + QUERIES, length)  # past the last key that a row of the tile sees
        top = tl.full((ROWS,), -float("inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        out = tl.zeros((ROWS, HEAD), tl.float32)
        if PARTS:
            low = tl.maximum(low, part)
        stop = tl.minimum(tl.cdiv(high, SPAN), part + 1) if PARTS else tl.cdiv(high, SPAN)
        for split in range(low, stop):
            top2, total2, out2 = _split(
                q, split * SPAN, tl.minimum(split * SPAN + SPAN, high), position, seen_from,
                k_ptr + group * k_group, v_ptr + group * v_group, ks_ptr + group * ks_group, vs_ptr + group * vs_group,
                table_ptr + b.to(tl.int64) * table_row, page, k_page, k_slot, v_page, v_slot, ks_page, ks_slot,
                vs_page, vs_slot, c, scale, softcap, factor, SOFTCAP, SCALED, DOT, ROWS, KEYS, HEAD,
            )  # fmt: skip
            top, total, out = _merge(top, total, out, top2, total2, out2)
        if PARTS:
            at = ((token * heads + head) * tl.num_programs(2) + part) * (HEAD + 2)
            tl.store(part_ptr + at, top, mask=used)
            tl.store(part_ptr + at + 1, total, mask=used)
            tl.store(part_ptr + at[:, None] + 2 + column[None, :], out, mask=used[:, None])
        else:
            total = tl.where(total == 0.0, 1.0, total)  # a request without keys
            out = tl.div_rn(out, tl.broadcast_to(total[:, None], out.shape))
            at = ((token * heads + head) * c)[:, None] + column[None, :]
            tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=wide)


@triton.jit
def _combine(part_ptr, out_ptr, c, parts, HEAD: tl.constexpr):
    """The splits of one token and head, from the first to the last."""
    row = tl.program_id(0).to(tl.int64)
    column, one = tl.arange(0, HEAD), tl.arange(0, 1)
    top = tl.full((1,), -float("inf"), tl.float32)
    total = tl.zeros((1,), tl.float32)
    out = tl.zeros((1, HEAD), tl.float32)
    for part in range(0, parts):
        at = part_ptr + (row * parts + part) * (HEAD + 2)
        out2 = tl.load(at + 2 + column)[None, :]
        top, total, out = _merge(top, total, out, tl.load(at + one), tl.load(at + 1 + one), out2)
    total = tl.where(total == 0.0, 1.0, total)
    out = tl.div_rn(out, tl.broadcast_to(total[:, None], out.shape))
    tl.store(out_ptr + row * c + column[None, :], out.to(out_ptr.dtype.element_ty), mask=(column < c)[None, :])


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
    (t, heads, c), (_, groups, page, _) = q_THC.shape, k_cache.shape
    requests, width = block_table.shape
    out_THC = torch.zeros_like(q_THC, memory_format=torch.contiguous_format)
    per_group = heads // groups
    head = max(triton.next_power_of_2(c), 16)
    per_query = triton.next_power_of_2(per_group)
    rows = max(ROWS, per_query)
    queries = rows // per_query
    span = KEYS * SPLIT
    parts = triton.cdiv(width * page, span) if max_query_len == 1 else 0
    parts = 0 if parts == 1 else parts  # one split is merged with nothing
    part = torch.empty((t, heads, parts, head + 2), dtype=torch.float32, device=q_THC.device)
    ks, vs = (k_cache, v_cache) if k_scale is None or v_scale is None else (k_scale, v_scale)
    fp32 = torch.float32 in (q_THC.dtype, k_cache.dtype)
    tiles = t if max_query_len == 1 else triton.cdiv(t, queries) + requests
    launch(
        _attend, (tiles if requests else 0, groups, max(parts, 1)), q_THC, out_THC, part, as_known(k_cache),
        as_known(v_cache), ks, vs, block_table, query_start, seq_lens, requests, page, heads, per_group, c,
        block_table.stride(0), *q_THC.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3], *ks.stride()[:3],
        *vs.stride()[:3], scale, softcap, window, temperature_len, math.log2(max(temperature_len, 2)),
        PARTS=parts > 0, SOFTCAP=softcap > 0, WARM=temperature_len > 0, SCALED=k_scale is not None,
        DOT=tl.float32 if fp32 else tl.bfloat16, QUERIES=queries, ROWS=rows, KEYS=KEYS, SPAN=span, HEAD=head,
        REQUESTS=triton.next_power_of_2(max(requests, 1)), num_warps=8, num_stages=2,
        enable_fp_fusion=False,
    )  # fmt: skip
    if parts:
        launch(_combine, (t * heads,), part, out_THC, c, parts, HEAD=head, num_warps=1, enable_fp_fusion=False)
    return out_THC
