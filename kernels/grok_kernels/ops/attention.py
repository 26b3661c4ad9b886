"""Rotary embedding, and attention over paged keys and values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import FP32, INT, Checker
from ..dtypes import FLOATS, dtype_name
from .define import op, result

KV_DTYPES = (*FLOATS, torch.float8_e4m3fn)


@op(writes=("k_cache", "v_cache", "k_scale", "v_scale"))
def rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Rotate q and k by their positions, write k and v into their pages, return the rotated q.

    rot(x)_C = [x1 cos − x2 sin, x2 cos + x1 sin], x1 and x2 the halves of C, angles positions · theta^(−2i/C), in fp32,
    rounded once to x's dtype. Token t goes to page slots[t] // S, place slots[t] % S; a slot of −1 writes nothing.

    q (T, H, C), k and v (T, G, C), one dtype, fp32 or bf16. k_cache, v_cache (P, G, S, C): fp32 or bf16, or e4m3 with
    k_scale, v_scale (P, G, S) fp32, one scale a token and head (amax / 448, nothing saturates). positions, slots (T,)
    int32. cos_sin (L, C) fp32: cos of the C/2 angles, then sin, for positions 0..L−1 (see `rope_table`).
    The caches and scales are written in place. The cpu backend refuses positions and slots outside them, before it
    writes anything. Source: Su et al., RoFormer, 2021 (half-rotation layout).
    """
    c = Checker("rope_store_kv")
    c.tensor("q", q, "T H C", FLOATS)
    c.tensor("k", k, "T G C", FLOATS)
    c.tensor("v", v, "T G C", FLOATS)
    c.same_dtype("k", k, "q", q)
    c.same_dtype("v", v, "q", q)
    _check_cache(c, k_cache, v_cache, k_scale, v_scale)
    c.tensor("positions", positions, "T", INT)
    c.tensor("slots", slots, "T", INT)
    c.tensor("cos_sin", cos_sin, "L C", FP32)
    if c.size("C") % 2:
        c.fail(f"q has shape {tuple(q.shape)}, expected an even head size C")
    return result(q.shape, q.dtype)


def rope_table(
    max_position: int,
    head_dim: int,
    theta: float,
    device: torch.device | str = "cpu",
    factors: Sequence[float] = (),
) -> Tensor:
    """cos_sin (max_position, head_dim) fp32 for `rope_store_kv`: cos, then sin, of position · theta^(−2i/head_dim),
    divided by factors[i] where there are any (head_dim / 2)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inv_freq = 1.0 / torch.tensor(theta, dtype=torch.float32, device=device) ** exponents
    if factors:
        inv_freq /= torch.tensor(factors, dtype=torch.float32, device=device)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device=device), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@op()
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    temperature_len: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Causal attention of a flat batch of query tokens over paged keys and values.

    s = scale · q·k; with a softcap s = softcap · tanh(s / softcap); where the query's position p exceeds
    temperature_len > 0, s *= log2(p) / log2(temperature_len); o = softmax(s over keys j ≤ p, and j > p − window where
    window > 0) · v. In fp32, rounded once to q's dtype. Query head h reads key head h // (H / G).

    q (T, H, C) fp32 or bf16; its rows query_start[b]..query_start[b+1] are the last tokens of request b, whose keys are
    the first seq_lens[b] places of its pages block_table[b]. Caches as in `rope_store_kv`. block_table (B, N) int32,
    whose entries past a request's last page are not read; query_start (B+1,) and seq_lens (B,) int32. max_query_len
    bounds the queries of one request, for the launch; it changes no result. A NaN among a request's keys or values may
    reach any of its queries, even those masked from it, but no other request's. The cpu backend refuses a query_start
    that does not ascend from 0 to T, and lengths and pages outside the table and the cache. Returns (T, H, C) of q's
    dtype.
    """
    c = Checker("paged_attention")
    c.tensor("q", q, "T H C", FLOATS)
    _check_cache(c, k_cache, v_cache, k_scale, v_scale)
    if c.size("G") < 1 or c.size("H") % c.size("G"):
        c.fail(f"q has H={c.size('H')} heads, expected a multiple of the cache's G={c.size('G')}")
    c.tensor("block_table", block_table, "B N", INT)
    c.tensor("seq_lens", seq_lens, "B", INT)
    c.tensor("query_start", query_start, "B_plus_1", INT)
    if c.size("B_plus_1") != c.size("B") + 1:
        c.fail(f"query_start has shape {tuple(query_start.shape)}, expected (B + 1,) with B={c.size('B')}")
    c.at_least("max_query_len", max_query_len, 0)
    c.positive("scale", scale)
    c.at_least("softcap", softcap, 0.0)
    c.at_least("window", window, 0)
    c.at_least("temperature_len", temperature_len, 0)
    if temperature_len == 1:
        c.fail("temperature_len=1, expected 0 (off) or at least 2, since log2(1) = 0 divides")
    return result(q.shape, q.dtype)


def _check_cache(c: Checker, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    c.tensor("k_cache", k_cache, "P G S C", KV_DTYPES)
    c.tensor("v_cache", v_cache, "P G S C", KV_DTYPES)
    c.same_dtype("v_cache", v_cache, "k_cache", k_cache)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype == torch.float8_e4m3fn:
            if scale is None:
                raise c.error(f"{name} is None, expected scales (P, G, S) for a cache of float8_e4m3fn")
            c.tensor(name, scale, "P G S", FP32)
        elif scale is not None:
            c.fail(f"{name} is given, expected None for a cache of {dtype_name(k_cache.dtype)}")
