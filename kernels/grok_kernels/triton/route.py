"""The router, and the order of rows by expert."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..counters import counter
from .arithmetic import tanh
from .launch import jit, launch
from .steps import FEW

TOKENS = 2  # of one program of the router; the same for all batches, since the order of additions depends on the tile
COLUMNS = 1024
ONE_HOT = 8192  # entries of a block's one-hot table (rows, experts), which registers bound


@triton.jit
def _write_order(own, row, one_hot, before, total, order_ptr, offsets_ptr, e, first, EXPERTS: tl.constexpr):
    """Store each row at its place: after all rows of lower experts, `before` rows of its own expert in earlier blocks,
    and those earlier in this block."""
    expert = tl.arange(0, EXPERTS)
    start = tl.cumsum(total, 0) - total
    if first:
        tl.store(offsets_ptr + expert, start, mask=expert < e)
        tl.store(offsets_ptr + e, tl.sum(total, 0))
    place = (start + before)[None, :] + tl.cumsum(one_hot, 0) - 1
    place = tl.sum(tl.where(one_hot == 1, place, 0), 1)
    tl.store(order_ptr + place, row, mask=(own >= 0) & (own < e))


@jit(batch=("t",))
def _route(
    x_ptr, router_ptr, weights_ptr, experts_ptr, done_ptr, order_ptr, offsets_ptr,
    t, d, e, k, x_stride, router_stride, softcap,
    SOFTCAP: tl.constexpr, RENORMALIZE: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With done_ptr, a counter, the program that ends last groups all rows, of which there are up to BLOCK, and sets
    the counter back to 0."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, EXPERTS)
    products = tl.zeros((TOKENS, EXPERTS, COLUMNS), tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x_mask = (token < t)[:, None] & (column < d)[None, :]
        w_mask = (expert < e)[:, None] & (column < d)[None, :]
        x = tl.load(x_ptr + token[:, None] * x_stride + column[None, :], mask=x_mask, other=0.0).to(tl.float32)
        w = tl.load(router_ptr + expert[:, None] * router_stride + column[None, :], mask=w_mask, other=0.0)
        products += x[:, None, :] * w[None, :, :]
    logits = tl.sum(products, 2)
    if SOFTCAP:
        logits = softcap * tanh(logits / softcap)
    logits = tl.where((expert < e)[None, :], logits, -float("inf"))
    raised = tl.exp(logits - tl.max(logits, 1)[:, None])
    probs = raised / tl.sum(raised, 1)[:, None]
    free = tl.broadcast_to((expert < e)[None, :], (TOKENS, EXPERTS))
    place = tl.arange(0, K)
    weights = tl.zeros((TOKENS, K), tl.float32)
    experts = tl.zeros((TOKENS, K), tl.int32)
    for i in tl.static_range(K):
        left = tl.where(free, probs, -1.0)
        best = tl.max(left, 1)
        chosen = tl.min(tl.where(left == best[:, None], expert[None, :], EXPERTS), 1)
        first = tl.min(tl.where(free, expert[None, :], EXPERTS), 1)  # for rows of NaN, where no comparison holds
        chosen = tl.where(chosen < EXPERTS, chosen, first)
        hit = expert[None, :] == chosen[:, None]
        weight = tl.sum(tl.where(hit, probs, 0.0), 1)
        weights = tl.where((place == i)[None, :], weight[:, None], weights)
        experts = tl.where((place == i)[None, :], chosen[:, None], experts)
        free = free & ~hit
    used = (token < t)[:, None] & (place < k)[None, :]
    if RENORMALIZE:
        weights = weights / tl.sum(tl.where((place < k)[None, :], weights, 0.0), 1)[:, None]
    at = token[:, None] * k + place[None, :]
    tl.store(weights_ptr + at, weights, mask=used)
    tl.store(experts_ptr + at, experts, mask=used)
    if done_ptr is not None:
        tl.debug_barrier()  # write all of this program's experts before counting it
        if tl.atomic_add(done_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            row = tl.arange(0, BLOCK)
            own = tl.load(experts_ptr + row, mask=row < t * k, other=-1, cache_modifier=".cg")
            one_hot = (own[:, None] == expert[None, :]).to(tl.int32)
            total = tl.sum(one_hot, 0)
            _write_order(own, row, one_hot, tl.zeros_like(total), total, order_ptr, offsets_ptr, e, True, EXPERTS)
            tl.store(done_ptr, 0)


def _launch_route(
    x_TD: Tensor, router_ED: Tensor, k: int, softcap: float, renormalize: bool,
    done: Tensor | None = None, order: Tensor | None = None, offsets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (t, d), e = x_TD.shape, router_ED.shape[0]
    weights_TA = torch.empty((t, k), dtype=torch.float32, device=x_TD.device)
    experts_TA = torch.empty((t, k), dtype=torch.int32, device=x_TD.device)
    padded = triton.next_power_of_2(e)
    launch(
        _route, (triton.cdiv(t, TOKENS),), x_TD, router_ED, weights_TA, experts_TA, done, order, offsets, t, d, e, k,
        x_TD.stride(0), router_ED.stride(0), softcap, SOFTCAP=softcap > 0, RENORMALIZE=renormalize,
        K=triton.next_power_of_2(k), TOKENS=TOKENS, EXPERTS=padded, COLUMNS=max(COLUMNS * 8 // max(padded, 8), 32),
        BLOCK=1 if done is None else _block(t * k, padded), num_warps=8,
    )  # fmt: skip
    return weights_TA, experts_TA


def route_topk(x_TD: Tensor, router_ED: Tensor, k: int, softcap: float, renormalize: bool) -> tuple[Tensor, Tensor]:
    return _launch_route(x_TD, router_ED, k, softcap, renormalize)


def route_and_group(
    x_TD: Tensor, router_ED: Tensor, k: int, softcap: float, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch where a block holds all rows, else the launches of the two ops."""
    e, rows, device = router_ED.shape[0], x_TD.shape[0] * k, x_TD.device
    if not 0 < rows <= _rows_of_a_block(triton.next_power_of_2(e)):
        weights, experts = route_topk(x_TD, router_ED, k, softcap, renormalize)
        return weights, experts, *group_tokens(experts, e)
    order = torch.empty(rows, dtype=torch.int32, device=device)
    offsets = torch.empty(e + 1, dtype=torch.int32, device=device)
    return *_launch_route(x_TD, router_ED, k, softcap, renormalize, counter(device), order, offsets), order, offsets


def _rows_of_a_block(experts: int) -> int:
    """The most rows of a block; a power of two if `experts` is one."""
    return max(min(ONE_HOT // experts, 1024), 1)


def _block(rows: int, experts: int) -> int:
    """The rows of a block: one of only two sizes, since each is a compile."""
    most = _rows_of_a_block(experts)
    return min(FEW, most) if rows <= FEW else most


@jit(batch=("n",), unaligned=("experts_ptr",))
def _count(experts_ptr, counts_ptr, n, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    row, expert = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    own = tl.load(experts_ptr + row, mask=row < n, other=-1)
    tl.store(counts_ptr + block * EXPERTS + expert, tl.sum((own[:, None] == expert[None, :]).to(tl.int32), 0))


@jit(batch=("n", "blocks"), unaligned=("experts_ptr",))
def _place(
    experts_ptr, counts_ptr, order_ptr, offsets_ptr, n, e, blocks,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A single block counts its rows itself and does not read `counts`."""
    block = tl.program_id(0)
    row, expert = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, EXPERTS)
    own = tl.load(experts_ptr + row, mask=row < n, other=-1)
    one_hot = (own[:, None] == expert[None, :]).to(tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    total = tl.sum(one_hot, 0)
    if blocks > 1:
        total = tl.zeros((EXPERTS,), tl.int32)
        for other in range(0, blocks):
            count = tl.load(counts_ptr + other * EXPERTS + expert)
            before += tl.where(other < block, count, 0)
            total += count
    _write_order(own, row, one_hot, before, total, order_ptr, offsets_ptr, e, block == 0, EXPERTS)


def group_tokens(experts_TA: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """One launch where a block holds all rows, two where several do."""
    flat = experts_TA.reshape(-1)
    n, device = flat.numel(), experts_TA.device
    order = torch.empty(n, dtype=torch.int32, device=device)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    padded = triton.next_power_of_2(num_experts)
    block = _block(n, padded)
    blocks = max(triton.cdiv(n, block), 1)
    counts = torch.empty((blocks, padded), dtype=torch.int32, device=device)
    if blocks > 1:
        launch(_count, (blocks,), flat, counts, n, EXPERTS=padded, BLOCK=block, num_warps=4)
    launch(
        _place, (blocks,), flat, counts, order, offsets, n, num_experts, blocks,
        EXPERTS=padded, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return order, offsets
