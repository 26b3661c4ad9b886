"""paged_attention: one query for each of many requests, or the last queries of one, over scattered pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .case import TURNS, Case, copies
from .contestant import Contestant
from .data import Once, kept
from .ours import reference
from .problems import CONTEXTS, KV, PAGES, Problem, family


@dataclass(frozen=True)
class Cache(Once):
    """Keys and values (P, G, S, C) in scattered pages and their table (B, N); contiguous for peers that need that."""

    k_pages: Tensor
    v_pages: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    table: Tensor
    length: int

    @classmethod
    def random(cls, batch: int, groups: int, length: int, c: int, page: int, fp8: bool, device: str) -> Cache:
        each = -(-length // page)
        table = torch.randperm(batch * each, device=device).view(batch, each).int()
        shape = (batch * each, groups, page, c)

        def pages() -> tuple[Tensor, Tensor | None]:
            x = torch.randn(shape, device=device, dtype=torch.bfloat16)
            if not fp8:
                return x, None
            scale = x.abs().amax(-1).float() / 448
            return (x / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale

        (k, k_scale), (v, v_scale) = pages(), pages()
        return cls(k, v, k_scale, v_scale, table, length)

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """All requests' keys and values, (B, G, L, C) bf16."""
        return self.once("contiguous", Cache._contiguous)

    def _contiguous(self) -> tuple[Tensor, Tensor]:
        found = []
        for cache, scale in ((self.k_pages, self.k_scale), (self.v_pages, self.v_scale)):
            x_BNGSC = cache[self.table.long()]
            if scale is not None:
                x_BNGSC = (x_BNGSC.float() * scale[self.table.long()].unsqueeze(-1)).bfloat16()
            found.append(x_BNGSC.transpose(1, 2).flatten(2, 3)[:, :, : self.length].contiguous())
        return found[0], found[1]


@dataclass(frozen=True)
class Attend:
    """One call: the last `queries` tokens of every request attend."""

    q_THC: Tensor
    cache: Cache
    queries: int
    scale: float
    softcap: float
    window: int
    temperature_len: int
    starts: Tensor
    lengths: Tensor

    @property
    def args(self) -> tuple[Any, ...]:
        c = self.cache
        return (
            self.q_THC, c.k_pages, c.v_pages, c.table, self.starts, self.lengths, self.queries, self.scale,
            self.softcap, self.window, self.temperature_len, c.k_scale, c.v_scale,
        )  # fmt: skip


def footprint(p: Problem) -> float:
    m = p.shape
    values = 2 * p.number("context") * m.num_kv_heads * m.head_dim * dict(p.values).get("batch", 1)
    return int(values) * (6 if p["kv"] == "bf16" else 3)  # the reference computes in fp32; fp8 is converted from bf16


@family(  # one query for each request of the batch
    "paged_attention",
    "{kv}-p{page}-b{batch}-l{context}",
    {"kv": KV, "page": PAGES, "batch": (1, 8, 64, 256), "context": CONTEXTS},
    phase="decode",
    footprint=footprint,
)
@family(  # the last queries of one request
    "paged_attention", "{kv}-p{page}-q{queries}-l{context}",
    {"kv": KV, "page": PAGES, "queries": (128, 512, 2048, 16384), "context": CONTEXTS}, phase="prefill",
    footprint=footprint, keep=lambda values: int(values["queries"]) <= int(values["context"]),
)  # fmt: skip
def build(p: Problem, device: str, cold: int) -> Case:
    m, length, page, fp8 = p.shape, p.number("context"), p.number("page"), p["kv"] == "fp8"
    batch, queries = (p.number("batch"), 1) if p.family.phase == "decode" else (1, p.number("queries"))
    h, g, c = m.num_heads, m.num_kv_heads, m.head_dim
    key = (batch, g, length, c, page, fp8, device)
    stored = 2 * batch * g * length * (c + 4 if fp8 else 2 * c)
    caches = kept((p.op, *key, cold), lambda: [Cache.random(*key) for _ in range(copies(stored, cold))])
    inputs = [
        Attend(
            torch.randn(batch * queries, h, c, device=device).bfloat16(), cache, queries, m.attn_scale, m.attn_softcap,
            m.sliding_window, m.attn_temperature_len,
            torch.arange(0, batch * queries + 1, queries, dtype=torch.int32, device=device),
            torch.full((batch,), length, dtype=torch.int32, device=device),
        )
        for cache in caches
        for _ in range(max(1, TURNS // len(caches)))
    ]  # fmt: skip
    seen = batch * sum(range(length - queries + 1, length + 1))
    return Case(
        inputs=inputs,
        expected=lambda inputs: reference(p.op, inputs.args),
        operations=4 * h * c * seen,
        bytes=stored + 4 * batch * queries * h * c,
        arithmetic="bf16",
        weights=2 * batch * g * length * c,
        weight_bytes=1 if fp8 else 2,
        stored=2 * batch * g * length * c,
    )


def capped(p: Problem) -> bool:
    """Whether the model has a softcap or a temperature."""
    return bool(p.shape.attn_softcap or p.shape.attn_temperature_len)


def without_softcap(c: Contestant) -> Contestant:
    """The same contestant without softcap and temperature, where the model has them, checked against that."""
    return replace(c, name=f"{c.name}, no softcap", instead=plain, enters=lambda p: c.enters(p) and capped(p))


def plain(inputs: Attend) -> Attend:
    """The same call without softcap and temperature."""
    return replace(inputs, softcap=0.0, temperature_len=0)
