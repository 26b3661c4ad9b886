"""paged_attention: one query, and a chunk of 512 of a prompt, over many keys, with Grok's softcap and without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import grok_kernels

from . import peers, peers_vllm
from .harness import Contestant, Setup, copies
from .machine import last_cache_bytes

PAGE, HEAD, SOFTCAP = 16, 128, 30.0


Attend = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Cache:
    """Keys and values (G, L, C) in bf16, for those who read them in one piece, and the same in scattered pages."""

    k_GLC: Tensor
    v_GLC: Tensor
    k_pages: Tensor
    v_pages: Tensor
    table: Tensor

    @classmethod
    def random(cls, groups: int, length: int, c: int) -> Cache:
        k, v = (torch.randn(groups, length, c).bfloat16() for _ in range(2))
        table = torch.randperm(length // PAGE)
        pages = []
        for x in (k, v):
            pages.append(torch.empty(length // PAGE, groups, PAGE, c, dtype=x.dtype))
            pages[-1][table] = x.unflatten(1, (-1, PAGE)).transpose(0, 1)
        return cls(k, v, pages[0], pages[1], table.int()[None])


@dataclass(frozen=True)
class Attention:
    queries: int  # the last of the keys' positions
    keys: int
    heads: int
    groups: int
    cache_bytes: int | None = None

    @property
    def op(self) -> str:
        return "paged_attention"

    @property
    def name(self) -> str:
        kind = "decode" if self.queries == 1 else f"prefill{self.queries}"
        return f"attention-{kind}-h{self.heads}-g{self.groups}-l{self.keys}"

    def small(self) -> Attention:
        return replace(self, queries=min(self.queries, 4), keys=64, heads=4, groups=2, cache_bytes=0)

    def build(self) -> Setup:
        cache_bytes = last_cache_bytes() if self.cache_bytes is None else self.cache_bytes
        size = 2 * self.groups * self.keys * HEAD * 2
        caches = copies(partial(Cache.random, self.groups, self.keys, HEAD), size, cache_bytes)
        q_THC = torch.randn(self.queries, self.heads, HEAD).bfloat16()

        def contestant(name: str, softcap: float, attend: Attend, pack: Callable[[Cache], Any]) -> Contestant:
            packed = [pack(cache) for cache in caches]
            return Contestant(
                name=name,
                call=lambda i: attend(q_THC, packed[i % len(packed)]),
                expected=lambda: exact(q_THC, caches[0], softcap),
                tolerance=peers.BF16_ERROR,
                bytes=size + 2 * q_THC.nbytes,
                ours=name.startswith("grok_kernels"),
            )

        def plain(cache: Cache) -> Cache:
            return cache

        contestants = [
            contestant("grok_kernels, softcap 30", SOFTCAP, paged(self.queries, self.keys, SOFTCAP), plain),
            contestant("grok_kernels, no softcap", 0.0, paged(self.queries, self.keys, 0.0), plain),
            contestant("torch sdpa, no softcap, no pages", 0.0, sdpa(self.queries, self.keys), plain),
        ]
        if self.queries == 1:
            name = "torch sdpa, the heads of a group as queries"
            contestants.append(contestant(name, 0.0, sdpa_heads_as_queries, plain))
        for softcap in (SOFTCAP, 0.0):
            name = f"vLLM cpu_attention_with_kv_cache, {f'softcap {softcap:.0f}' if softcap else 'no softcap'}"
            if why := peers.load_vllm():
                contestants.append(Contestant(name=name, missing=why))
            else:
                attend = peers_vllm.attention(self.queries, self.keys, self.heads, self.groups, HEAD, softcap)
                contestants.append(contestant(name, softcap, attend, lambda c: peers_vllm.pages(c.k_GLC, c.v_GLC)))
        seen = sum(range(self.keys - self.queries + 1, self.keys + 1))
        return Setup(
            operations=4 * self.heads * HEAD * seen,
            bytes=size + 2 * q_THC.nbytes,
            arithmetic="bf16",
            contestants=contestants,
        )


def exact(q_THC: Tensor, cache: Cache, softcap: float) -> Tensor:
    """In fp32, head by head."""
    t, heads, c = q_THC.shape
    groups, length, _ = cache.k_GLC.shape
    hidden = torch.ones(t, length, dtype=torch.bool).triu(length - t + 1)
    out = torch.empty(t, heads, c)
    for h in range(heads):
        k, v = (x[h // (heads // groups)].float() for x in (cache.k_GLC, cache.v_GLC))
        s = q_THC[:, h].float() @ k.t() * c**-0.5
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        out[:, h] = torch.softmax(s.masked_fill(hidden, float("-inf")), -1) @ v
    return out


def paged(queries: int, keys: int, softcap: float) -> Attend:
    starts = torch.tensor([0, queries], dtype=torch.int32)
    lengths = torch.tensor([keys], dtype=torch.int32)
    return lambda q_THC, cache: grok_kernels.paged_attention(
        q_THC, cache.k_pages, cache.v_pages, cache.table, starts, lengths, queries, HEAD**-0.5, softcap
    )


def sdpa(queries: int, keys: int) -> Attend:
    mask = None if queries == 1 else torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)

    def attend(q_THC: Tensor, cache: Cache) -> Tensor:
        q, k, v = q_THC.transpose(0, 1)[None], cache.k_GLC[None], cache.v_GLC[None]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def sdpa_heads_as_queries(q_THC: Tensor, cache: Cache) -> Tensor:
    """Of one token: the heads that share keys are as good as so many queries of one head."""
    q_GRC = q_THC[0].unflatten(0, (cache.k_GLC.shape[0], -1))
    out = functional.scaled_dot_product_attention(q_GRC[None], cache.k_GLC[None], cache.v_GLC[None])
    return out.reshape(q_THC.shape)


PROBLEMS = tuple(Attention(t, keys, h, g) for h, g in ((12, 2), (48, 8)) for t in (1, 512) for keys in (4096, 32768))
