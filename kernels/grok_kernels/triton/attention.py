"""Causal attention over paged keys and values: prefill, decode and mixed batches by one chain of additions.

A tile holds a few queries with all heads that share a key head, so that one load of a key serves them all; its shape
depends on the model alone. Keys are divided into blocks, and blocks into splits, at fixed places. Each split has its
own running maximum, sum and output, and splits merge from the first to the last. A request with one query has a
program for each of its splits, and a second kernel merges them; for a request with more, one program goes through
all splits of a tile. Both do the same operations in the same order, with no fused multiply-add but where the code
asks for one, so a token's bits depend on neither batch nor chunk. The device assigns work to programs from the
lengths, so that a graph may be replayed with other lengths, and a block table far wider than the requests are long
costs nothing.

p is multiplied as the sum of two bf16 numbers, its rounding and the remainder: with the rounding alone the result would
not be that of fp32, rounded once. On an H100, prefill and decode of bf16 pages multiply by wgmma, whose tiles have 64
rows. Decode of e4m3 pages, where a query fills 6 rows and conversion is the bound, multiplies 16 rows by mma.sync.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..chips import chip_of
from ..tuning import attention
from .arithmetic import tanh
from .gemm import as_type
from .launch import jit, launch
from .quantize import as_known
from .steps import requests_of

SPAN = 512  # keys of a split: a request of 4096 keys fills half of an H100, and merging is a fortieth of the work
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _safe(top):
    """The maximum to subtract: 0 where all keys so far were masked, so that exp2(-inf - 0) is 0 and not NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _merge(top, total, out, top2, total2, out2):
    """Merge two splits. One in which all keys were masked (-inf, 0, 0) changes no bit of the other."""
    new = tl.maximum(top, top2)
    a, b = tl.exp2(top - _safe(new)), tl.exp2(top2 - _safe(new))
    return new, total * a + total2 * b, out * a[:, None] + out2 * b[:, None]


@triton.jit
def _store(out_ptr, at, total, out, mask):
    total = tl.where(total == 0.0, 1.0, total)  # a request without keys
    out *= (1.0 / total)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lowest(position, window, SPAN: tl.constexpr):
    """The first split that a query at this position sees."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0) // SPAN


@triton.jit
def _queries(starts_ptr, requests, REQUESTS: tl.constexpr):
    """How many queries each request has."""
    request = tl.arange(0, REQUESTS)
    mask = request < requests
    return tl.load(starts_ptr + request + 1, mask=mask, other=0) - tl.load(starts_ptr + request, mask=mask, other=0)


@triton.jit
def _find(item, items):
    """The request that a work item belongs to, where request b has items[b], and the item's number within it."""
    ends = tl.cumsum(items, 0)
    b = tl.sum((ends <= item).to(tl.int32))
    return b, item - tl.sum(tl.where(tl.arange(0, items.shape[0]) < b, items, 0))


_WORD_AS_BF16 = tl.constexpr("""
{
.reg .b32 x, y, u, v, m;
prmt.b32 x, $4, 0, 0x1404;
prmt.b32 y, $4, 0, 0x3424;
shr.b32 u, x, 4;
shr.b32 v, y, 4;
lop3.b32 u, u, 0x07f007f0, 0, 0xc0;
lop3.b32 v, v, 0x07f007f0, 0, 0xc0;
lop3.b32 u, x, 0x80008000, u, 0xea;
lop3.b32 v, y, 0x80008000, v, 0xea;
mov.b32 m, 0x7b807b80;
mul.rn.bf16x2 u, u, m;
mul.rn.bf16x2 v, v, m;
mov.b32 {$0, $1}, u;
mov.b32 {$2, $3}, v;
}
""")  # move each byte's exponent and fraction to their places in bf16; times 2**120, the difference of the biases


@triton.jit
def _converted(x, always, DOT: tl.constexpr):
    """`as_type`. Words of four e4m3 take a fourth of the instructions, but their NaN becomes 480: see `_block`.

    `always` is true, and hides the joins from Triton behind a branch: seeing them, it would make mma.sync multiply the
    columns of K in another order than wgmma does, and prefill and decode would differ in the last bit.
    """
    if x.dtype == tl.int32:
        y = tl.zeros((x.shape[0], x.shape[1] * 4), DOT)
        if always:
            a, b, c, d = tl.inline_asm_elementwise(
                _WORD_AS_BF16, "=h,=h,=h,=h,r", [x], dtype=(tl.bfloat16,) * 4, is_pure=True, pack=1
            )
            y = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (x.shape[0], x.shape[1] * 4))
    else:
        y = as_type(x, DOT)
    return y


@triton.jit
def _pages(at, end, table_ptr, PAGE: tl.constexpr, KEYS: tl.constexpr):
    """The page of each key of a block, or the one page of all its keys."""
    if PAGE % KEYS == 0:
        page = tl.load(table_ptr + at // PAGE, mask=at < end, other=0)
    else:
        key = at + tl.arange(0, KEYS)
        page = tl.load(table_ptr + key // PAGE, mask=key < end, other=0)
    return page


@triton.jit
def _block(
    at, end, page, k_ptr, v_ptr, ks_ptr, vs_ptr,
    SCALED: tl.constexpr, PAGE: tl.constexpr, K_PAGE: tl.constexpr, K_SLOT: tl.constexpr, V_PAGE: tl.constexpr,
    V_SLOT: tl.constexpr, KS_PAGE: tl.constexpr, KS_SLOT: tl.constexpr, VS_PAGE: tl.constexpr, VS_SLOT: tl.constexpr,
    UNIT: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The block of keys and values from `at` on, and their scales; what is masked is not loaded."""
    WORD: tl.constexpr = 4 if k_ptr.dtype.element_ty == tl.int32 else 1
    ZERO: tl.constexpr = 0 if WORD == 4 else 0.0
    column = tl.arange(0, HEAD // WORD)
    key = at + tl.arange(0, KEYS)
    inside = key < end
    slot = key % PAGE
    if UNIT < 16:
        page = page.to(tl.int64)
    mask = inside[:, None] & (column < C // WORD)[None, :]
    k_at = (page * (K_PAGE // UNIT) + slot * (K_SLOT // UNIT)).to(tl.int64) * UNIT
    v_at = (page * (V_PAGE // UNIT) + slot * (V_SLOT // UNIT)).to(tl.int64) * UNIT
    k = tl.load(k_ptr + k_at[:, None] + column[None, :], mask=mask, other=ZERO)
    v = tl.load(v_ptr + v_at[:, None] + column[None, :], mask=mask, other=ZERO)
    ks, vs = tl.zeros((KEYS,), tl.float32), tl.zeros((KEYS,), tl.float32)
    if SCALED:
        ks = tl.load(ks_ptr + page * KS_PAGE + slot * KS_SLOT, mask=inside, other=0.0)
        vs = tl.load(vs_ptr + page * VS_PAGE + slot * VS_SLOT, mask=inside, other=0.0)
        if WORD == 4:  # a NaN is stored with a scale that is NaN or infinite; make it NaN, since the code became 480
            ks += ks - ks
            vs += vs - vs
    return k, v, ks, vs


@triton.jit
def _attend(
    q, lowest, position, first, end, k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr,
    scale, softcap, window, temperature_len, log2_len,
    SPLITS: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WARM: tl.constexpr, SCALED: tl.constexpr,
    DOT: tl.constexpr, PAGE: tl.constexpr, K_PAGE: tl.constexpr, K_SLOT: tl.constexpr, V_PAGE: tl.constexpr,
    V_SLOT: tl.constexpr, KS_PAGE: tl.constexpr, KS_SLOT: tl.constexpr, VS_PAGE: tl.constexpr, VS_SLOT: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr, SPAN: tl.constexpr,
    HEAD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Keys first..end−1 of one request, from the start of a split: each row's maximum, sum and output over its unmasked
    keys. The keys are those of one split or, with SPLITS, of several, which are merged. AHEAD: as in `tuning.Tile`."""
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, HEAD), tl.float32)
    before, total_before, out_before = top, total, out
    always = tl.num_programs(0) > 0
    if WARM:
        ones = tl.full((ROWS,), 1.0, tl.float32)
        warm = tl.div_rn(tl.log2(tl.maximum(position, 1).to(tl.float32)), ones * log2_len)
        factor = tl.where(position > temperature_len, warm, 1.0)[:, None]
    if AHEAD != "":
        page = _pages(first, end, table_ptr, PAGE, KEYS)
    if AHEAD == "blocks":
        k, v, ks, vs = _block(
            first, end, page, k_ptr, v_ptr, ks_ptr, vs_ptr, SCALED, PAGE, K_PAGE, K_SLOT, V_PAGE, V_SLOT,
            KS_PAGE, KS_SLOT, VS_PAGE, VS_SLOT, UNIT, KEYS, HEAD, C,
        )  # fmt: skip
        page2 = _pages(first + KEYS, end, table_ptr, PAGE, KEYS)
    for at in range(first, end, KEYS):
        key = at + tl.arange(0, KEYS)
        if AHEAD == "":
            page = tl.load(table_ptr + key // PAGE, mask=key < end, other=0)
        if AHEAD == "" or AHEAD == "pages":
            k, v, ks, vs = _block(
                at, end, page, k_ptr, v_ptr, ks_ptr, vs_ptr, SCALED, PAGE, K_PAGE, K_SLOT, V_PAGE, V_SLOT,
                KS_PAGE, KS_SLOT, VS_PAGE, VS_SLOT, UNIT, KEYS, HEAD, C,
            )  # fmt: skip
            if AHEAD == "pages":
                page = _pages(at + KEYS, end, table_ptr, PAGE, KEYS)
        else:
            k2, v2, ks2, vs2 = _block(
                at + KEYS, end, page2, k_ptr, v_ptr, ks_ptr, vs_ptr, SCALED, PAGE, K_PAGE, K_SLOT, V_PAGE, V_SLOT,
                KS_PAGE, KS_SLOT, VS_PAGE, VS_SLOT, UNIT, KEYS, HEAD, C,
            )  # fmt: skip
            page, page2 = page2, _pages(at + 2 * KEYS, end, table_ptr, PAGE, KEYS)
        s = tl.dot(q, tl.trans(_converted(k, always, DOT)), input_precision="ieee")
        if SCALED:
            s = s * ks[None, :]
        # in base 2 from here on
        if not SOFTCAP:
            s = s * (scale * LOG2E)
        elif tl.float32 == DOT:
            s = softcap * tanh(s * scale / softcap) * LOG2E
        else:  # tanh(x) = 1 − 2 / (1 + e^2x): near 0 not to its last place, but to that of a score
            r = tl.rsqrt(1.0 + tl.exp2(s * (scale / softcap * (2 * LOG2E))))  # a division takes ten instructions
            s = tl.fma(r * r, -2 * LOG2E * softcap, LOG2E * softcap)
        if WARM:
            s = s * factor
        if at + KEYS > lowest + 1 or WINDOW:
            seen = key[None, :] <= position[:, None]
            if WINDOW:
                seen = seen & (key[None, :] > position[:, None] - window)
            s = tl.where(seen, s, -float("inf"))
        if SPLITS and at % SPAN == 0:
            before, total_before, out_before = _merge(before, total_before, out_before, top, total, out)
            top = tl.full((ROWS,), -float("inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            out = tl.zeros((ROWS, HEAD), tl.float32)
        new = tl.maximum(top, tl.max(s, 1))
        keep = tl.exp2(top - _safe(new))
        p = tl.exp2(s - _safe(new)[:, None])
        total = total * keep + tl.sum(p, 1)
        if SCALED:
            p = p * vs[None, :]
        v_dot = _converted(v, always, DOT)
        out *= keep[:, None]
        if tl.bfloat16 == DOT:
            bits = (p.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
            high = bits.to(tl.float32, bitcast=True)  # p in bf16, by integers, since a cast and back takes a slow unit
            out = tl.dot(high.to(DOT), v_dot, out)
            out = tl.dot((p - high).to(DOT), v_dot, out)
        else:
            out = tl.dot(p, v_dot, out, input_precision="ieee")
        top = new
        if AHEAD == "blocks":
            k, v, ks, vs = k2, v2, ks2, vs2
    if SPLITS:
        top, total, out = _merge(before, total_before, out_before, top, total, out)
    return top, total, out


@triton.jit
def _whose(tile, tiles, queries, starts_ptr):
    """The request of a tile, the tile's first query, and the number of the request's queries from that one on."""
    b, tile = _find(tile, tiles)
    start, end = tl.load(starts_ptr + b), tl.load(starts_ptr + b + 1)
    first = start + tile * queries
    return b, first.to(tl.int64), end - first


@triton.jit
def _rows(
    zero, left, q_row, q_head,
    PER_GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """For a tile: the query of each row, and the offsets and mask of its columns."""
    row, column = zero + tl.arange(0, ROWS), tl.arange(0, HEAD)
    index = row // PER_GROUP
    at = (index * q_row + row % PER_GROUP * q_head)[:, None] + column[None, :]
    return index, at, ((index < ROWS // PER_GROUP) & (index < left))[:, None] & (column < C)[None, :]


@jit(batch=("least", "requests", "table_row"), unaligned=("table_ptr", "starts_ptr", "lengths_ptr"))
def _tiles(
    q_ptr, out_ptr, least, k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, starts_ptr, lengths_ptr, requests,
    heads, table_row, q_row, q_head, k_group, v_group, ks_group, vs_group,
    scale, softcap, window, temperature_len, log2_len,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WARM: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
    PAGE: tl.constexpr, K_PAGE: tl.constexpr, K_SLOT: tl.constexpr, V_PAGE: tl.constexpr, V_SLOT: tl.constexpr,
    KS_PAGE: tl.constexpr, KS_SLOT: tl.constexpr, VS_PAGE: tl.constexpr, VS_SLOT: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr, SPAN: tl.constexpr,
    HEAD: tl.constexpr, C: tl.constexpr, PER_GROUP: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    """A tile of queries and all of their keys, for the requests that have at least `least` queries."""
    tile, group = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # tiles with the most keys start first
    count = _queries(starts_ptr, requests, REQUESTS)
    queries = ROWS // PER_GROUP
    tiles = tl.where(count >= least, (count + queries - 1) // queries, 0)
    if tile < tl.sum(tiles):
        b, token, left = _whose(tile, tiles, queries, starts_ptr)
        index, at, mask = _rows(0, left, q_row, q_head, PER_GROUP, ROWS, HEAD, C)
        q = as_type(tl.load(q_ptr + token * q_row + group * PER_GROUP * q_head + at, mask=mask, other=0.0), DOT)
        length = tl.load(lengths_ptr + b)
        first = length - left
        high = tl.minimum(first + queries, length)  # past the last key that a row of the tile sees
        _top, total, out = _attend(
            q, first, first + index, _lowest(first, window, SPAN) * SPAN, high,
            k_ptr + group * k_group, v_ptr + group * v_group, ks_ptr + group * ks_group, vs_ptr + group * vs_group,
            table_ptr + b.to(tl.int64) * table_row,
            scale, softcap, window, temperature_len, log2_len, True, SOFTCAP, WINDOW, WARM, SCALED,
            DOT, PAGE, K_PAGE, K_SLOT, V_PAGE, V_SLOT, KS_PAGE, KS_SLOT, VS_PAGE, VS_SLOT,
            UNIT, ROWS, KEYS, AHEAD, SPAN, HEAD, C,
        )  # fmt: skip
        # a zero that the compiler cannot see: offsets computed again take no registers during the loop over keys
        zero = tl.program_id(2)
        _index, at, mask = _rows(zero, left, heads * C, C, PER_GROUP, ROWS, HEAD, C)
        _store(out_ptr + (token * heads + group * PER_GROUP) * C, at, total, out, mask)


@triton.jit
def _items(starts_ptr, lengths_ptr, requests, window, SPAN: tl.constexpr, REQUESTS: tl.constexpr):
    """The number of splits of each request with one query; 0 for the others."""
    request = tl.arange(0, REQUESTS)
    lengths = tl.load(lengths_ptr + request, mask=request < requests, other=0)
    one = _queries(starts_ptr, requests, REQUESTS) == 1
    return tl.where(one, tl.cdiv(lengths, SPAN) - _lowest(lengths - 1, window, SPAN), 0)


@jit(batch=("parts", "requests", "table_row"), unaligned=("table_ptr", "starts_ptr", "lengths_ptr"))
def _splits(
    q_ptr, part_ptr, sums_ptr, parts, k_ptr, v_ptr, ks_ptr, vs_ptr, table_ptr, starts_ptr, lengths_ptr, requests,
    heads, table_row, q_row, q_head, k_group, v_group, ks_group, vs_group,
    scale, softcap, window, temperature_len, log2_len,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, WARM: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
    PAGE: tl.constexpr, K_PAGE: tl.constexpr, K_SLOT: tl.constexpr, V_PAGE: tl.constexpr, V_SLOT: tl.constexpr,
    KS_PAGE: tl.constexpr, KS_SLOT: tl.constexpr, VS_PAGE: tl.constexpr, VS_SLOT: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr, SPAN: tl.constexpr,
    HEAD: tl.constexpr, C: tl.constexpr, PER_GROUP: tl.constexpr, REQUESTS: tl.constexpr,
):  # fmt: skip
    """The splits of the requests with one query: outputs in part (B, H, parts, HEAD), maxima and sums in sums
    (B, H, parts, 2)."""
    groups = heads // PER_GROUP
    items = tl.sum(_items(starts_ptr, lengths_ptr, requests, window, SPAN, REQUESTS)) * groups
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # a zero that the compiler cannot see: what is computed again takes no registers meanwhile
        zero = tl.minimum(item, tl.program_id(2))
        b, split = _find(item // groups, _items(starts_ptr + zero, lengths_ptr, requests, window, SPAN, REQUESTS))
        group = item % groups
        length = tl.load(lengths_ptr + b)
        token = tl.load(starts_ptr + b).to(tl.int64)
        split += _lowest(length - 1, window, SPAN)
        row, column = tl.arange(0, ROWS), tl.arange(0, HEAD)
        head = group * PER_GROUP + row
        used = row < PER_GROUP
        q_at = (token * q_row + head * q_head)[:, None] + column[None, :]
        q = as_type(tl.load(q_ptr + q_at, mask=used[:, None] & (column < C)[None, :], other=0.0), DOT)
        top, total, out = _attend(
            q, length - 1, tl.zeros((ROWS,), tl.int32) + length - 1,
            split * SPAN, tl.minimum(split * SPAN + SPAN, length),
            k_ptr + group * k_group, v_ptr + group * v_group, ks_ptr + group * ks_group, vs_ptr + group * vs_group,
            table_ptr + b.to(tl.int64) * table_row,
            scale, softcap, window, temperature_len, log2_len, False, SOFTCAP, WINDOW, WARM, SCALED,
            DOT, PAGE, K_PAGE, K_SLOT, V_PAGE, V_SLOT, KS_PAGE, KS_SLOT, VS_PAGE, VS_SLOT,
            UNIT, ROWS, KEYS, AHEAD, SPAN, HEAD, C,
        )  # fmt: skip
        row, column = zero + tl.arange(0, ROWS), tl.arange(0, HEAD)
        used = row < PER_GROUP
        at = (b.to(tl.int64) * heads + group * PER_GROUP + row) * parts + split
        tl.store(sums_ptr + at * 2, top, mask=used)
        tl.store(sums_ptr + at * 2 + 1, total, mask=used)
        tl.store(part_ptr + at[:, None] * HEAD + column[None, :], out, mask=used[:, None])


@jit(batch=("parts",), unaligned=("starts_ptr", "lengths_ptr"))
def _combine(
    part_ptr, sums_ptr, out_ptr, starts_ptr, lengths_ptr, heads, parts, window,
    SPAN: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one head of a request with one query, from the first to the last."""
    b, head = tl.program_id(0), tl.program_id(1)
    token = tl.load(starts_ptr + b).to(tl.int64)
    if tl.load(starts_ptr + b + 1) == token + 1:
        length = tl.load(lengths_ptr + b)
        column, one = tl.arange(0, HEAD)[None, :], tl.arange(0, 1)
        top = tl.full((1,), -float("inf"), tl.float32)
        total = tl.zeros((1,), tl.float32)
        out = tl.zeros((1, HEAD), tl.float32)
        row = (b.to(tl.int64) * heads + head) * parts
        for split in range(_lowest(length - 1, window, SPAN), tl.cdiv(length, SPAN)):
            at = row + split
            top2, total2 = tl.load(sums_ptr + at * 2 + one), tl.load(sums_ptr + at * 2 + 1 + one)
            top, total, out = _merge(top, total, out, top2, total2, tl.load(part_ptr + at * HEAD + column))
        _store(out_ptr, (token * heads + head) * C + column, total, out, column < C)


def _are_words(*caches: Tensor) -> bool:
    """Whether e4m3 can be loaded as words of four."""
    return all(
        x.dtype == torch.float8_e4m3fn and not any(n % 4 for n in (x.shape[3], x.storage_offset(), *x.stride()[:3]))
        for x in caches
    )


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
    out_THC = torch.empty_like(q_THC, memory_format=torch.contiguous_format)
    per_group = heads // groups
    head = max(triton.next_power_of_2(c), 16)
    ks, vs = (k_cache, v_cache) if k_scale is None or v_scale is None else (k_scale, v_scale)
    fp32 = torch.float32 in (q_THC.dtype, k_cache.dtype)
    chip = chip_of(q_THC.device)
    tile = attention("fp32" if fp32 else "bf16", k_cache.dtype, chip)
    if tile.words and not knobs.runtime.interpret:
        if _are_words(k_cache, v_cache):
            k_cache, v_cache = k_cache.view(torch.int32), v_cache.view(torch.int32)
        else:  # of single bytes, mma.sync would multiply the columns in another order than wgmma does
            tile = replace(tile, decode=tile.prefill, resident=1)
    rows, one = (max(x.rows, triton.next_power_of_2(per_group)) for x in (tile.prefill, tile.decode))
    args = (
        as_known(k_cache), as_known(v_cache), ks, vs, block_table, query_start, seq_lens, requests, heads,
        block_table.stride(0), *q_THC.stride()[:2], k_cache.stride(1), v_cache.stride(1), ks.stride(1), vs.stride(1),
        scale, softcap, window, temperature_len, math.log2(max(temperature_len, 2)),
    )  # fmt: skip
    strides = {
        "K_PAGE": k_cache.stride(0), "K_SLOT": k_cache.stride(2),
        "V_PAGE": v_cache.stride(0), "V_SLOT": v_cache.stride(2),
    }  # fmt: skip
    scales = {
        "KS_PAGE": ks.stride(0), "KS_SLOT": ks.stride(2), "VS_PAGE": vs.stride(0), "VS_SLOT": vs.stride(2),
    }  # fmt: skip
    meta = {
        "SOFTCAP": softcap > 0, "WINDOW": window > 0, "WARM": temperature_len > 0, "SCALED": k_scale is not None,
        "DOT": tl.float32 if fp32 else tl.bfloat16, "PAGE": page, **strides, **scales,
        "UNIT": math.gcd(16, *strides.values()), "KEYS": tile.keys, "SPAN": SPAN, "HEAD": head, "C": c,
        "PER_GROUP": per_group, "REQUESTS": requests_of(requests), "enable_fp_fusion": False,
    }  # fmt: skip
    if max_query_len != 1 and requests:
        # a single request has all queries, even where that is one
        tiles = triton.cdiv(t, rows // per_group) + requests
        # unbounded, the ptxas of Triton 3.6 aims at 128 registers in fp32, and spills
        bound = {"maxnreg": 248} if chip.capability and fp32 else {}
        launch(
            _tiles, (tiles, groups), q_THC, out_THC, 1 if requests == 1 else 2, *args, **meta, **bound, ROWS=rows,
            AHEAD=tile.prefill.ahead, num_warps=tile.prefill.warps, num_stages=tile.prefill.stages,
        )  # fmt: skip
        if requests == 1:
            return out_THC
    parts = triton.cdiv(width * page, SPAN)
    part = torch.empty((requests, heads, parts, head), dtype=torch.float32, device=q_THC.device)
    sums = torch.empty((requests, heads, parts, 2), dtype=torch.float32, device=q_THC.device)
    programs = min(requests * parts * groups, tile.resident * chip.multiprocessors)
    if chip.capability and not (fp32 and chip.capability == 90):  # there the ptxas of Triton 3.6 spills if bounded
        meta["maxnreg"] = min(65536 // (32 * tile.decode.warps * tile.resident) // 8 * 8, 255)
    launch(
        _splits, (programs,), q_THC, part, sums, parts, *args, **meta, ROWS=one,
        AHEAD=tile.decode.ahead, num_warps=tile.decode.warps, num_stages=tile.decode.stages,
    )  # fmt: skip
    launch(
        _combine, (requests, heads), part, sums, out_THC, query_start, seq_lens, heads, parts, window,
        SPAN=SPAN, HEAD=head, C=c, num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return out_THC
