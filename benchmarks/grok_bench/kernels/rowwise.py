"""The row-wise ops: norms, rotation, routing, grouping, quantisation, sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import TURNS, Case, Plain, copies
from .data import routing
from .ours import reference, rope_table
from .problems import Problem

EPS, GROUP = 1e-5, 128


def _case(p: Problem, cold: int, make: Callable[[int], Any], operations: float, size: float, **options: Any) -> Case:
    inputs = [make(turn) for turn in range(max(TURNS, copies(size, cold)))]
    options = {"arithmetic": "fp32", "expected": lambda inputs: reference(p.op, inputs.args), **options}
    return Case(inputs=inputs, operations=operations, bytes=size, **options)


def rms_norm(p: Problem, device: str, cold: int) -> Case:
    t, d = p.number("tokens"), p.shape.d_model
    weight_D = torch.randn(d, device=device)
    return _case(
        p,
        cold,
        lambda turn: Plain((torch.randn(t, d, device=device).bfloat16(), weight_D, EPS)),
        operations=4 * t * d,
        size=2 * t * d * 2 + 4 * d,
    )


def sandwich_norm(p: Problem, device: str, cold: int, **options: Any) -> Case:
    t, d = p.number("tokens"), p.shape.d_model
    post, pre = (torch.randn(d, device=device) for _ in range(2))

    def make(turn: int) -> Plain:
        h, delta = (torch.randn(t, d, device=device).bfloat16() for _ in range(2))
        return Plain((h, delta, post if p.shape.post_norms else None, pre, EPS))

    options = {"operations": 9 * t * d, "size": 4 * t * d * 2 + 8 * d, **options}
    return _case(p, cold, make, **options)


def sandwich_norm_fp8(p: Problem, device: str, cold: int) -> Case:
    t, d = p.number("tokens"), p.shape.d_model

    def expected(inputs: Plain) -> tuple[Tensor, Tensor, Tensor]:
        h, y = reference("sandwich_norm", inputs.args)
        return h, y, y

    return sandwich_norm(
        p,
        device,
        cold,
        operations=12 * t * d,
        size=4 * t * d * 2 + 8 * d + t * d + 4 * t * -(-d // GROUP),
        expected=expected,
        shown=lambda result, inputs: (*result[:2], _dequantized(*result[2:])),
        tolerance=0.04,
    )


@dataclass(frozen=True)
class Stored:
    """Tokens to be written to successive slots, in pages of a random order."""

    args: tuple[Any, ...]

    @property
    def written(self) -> tuple[Tensor, ...]:
        """Keys and values read back from where they should be, (T, G, C) fp32."""
        _, _, _, k_cache, v_cache, _, slots, _, k_scale, v_scale = self.args
        page, place = (slots // k_cache.shape[2]).long(), (slots % k_cache.shape[2]).long()
        found = []
        for cache, scale in ((k_cache, k_scale), (v_cache, v_scale)):
            x = cache.float()[page, :, place]
            found.append(x if scale is None else x * scale[page, :, place].unsqueeze(-1))
        return tuple(found)


def _clear(inputs: Stored) -> None:
    for cache in (*inputs.args[3:5], *inputs.args[8:10]):
        if cache is not None:
            cache.zero_()


def rope_store_kv(p: Problem, device: str, cold: int) -> Case:
    t, page, m = p.number("tokens"), p.number("page"), p.shape
    h, g, c = m.num_heads, m.num_kv_heads, m.head_dim
    fp8 = p["kv"] == "fp8"
    cos_sin = rope_table(max(t, 4096), c, m.rope_theta, device)
    pages = -(-t // page)

    def make(turn: int) -> Stored:
        q, k, v = (torch.randn(t, n, c, device=device).bfloat16() for n in (h, g, g))
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        caches = [torch.zeros(pages, g, page, c, dtype=dtype, device=device) for _ in range(2)]
        scales = [torch.zeros(pages, g, page, device=device) if fp8 else None for _ in range(2)]
        order = torch.randperm(pages, device=device)
        slots = (order[:, None] * page + torch.arange(page, device=device)).flatten()[:t].int()
        positions = torch.arange(t, dtype=torch.int32, device=device)
        return Stored((q, k, v, *caches, positions, slots, cos_sin, *scales))

    def expected(inputs: Stored) -> Any:
        return reference(p.op, inputs.args), *inputs.written

    values = t * (h + 2 * g) * c
    return _case(
        p,
        cold,
        make,
        operations=3 * t * (h + g) * c,
        size=2 * values + 2 * t * h * c + 2 * t * g * c * (1 if fp8 else 2),
        expected=expected,
        shown=lambda result, inputs: (result, *inputs.written),
        reset=_clear,
        tolerance=0.04 if fp8 else 0.01,
    )


def route(p: Problem, device: str, cold: int) -> Case:
    """`route_topk`, and `route_and_group`, which also writes the grouping."""
    t, m = p.number("tokens"), p.shape
    d, e, a = m.d_model, m.num_experts, m.num_experts_per_tok
    router = torch.randn(e, d, device=device) * d**-0.5
    grouping = 4 * t * a + 4 * (e + 1) if p.op == "route_and_group" else 0
    return _case(
        p,
        cold,
        lambda turn: Plain((torch.randn(t, d, device=device).bfloat16(), router, a, m.router_softcap, m.renormalize)),
        operations=2 * t * d * e,
        size=2 * t * d + 4 * e * d + 8 * t * a + grouping,
    )


def group_tokens(p: Problem, device: str, cold: int) -> Case:
    t, m = p.number("tokens"), p.shape
    a, e = m.num_experts_per_tok, m.num_experts
    return _case(
        p,
        cold,
        lambda turn: Plain((routing(str(p["routing"]), t, e, a, turn, device), e)),
        operations=t * a,
        size=8 * t * a + 4 * (e + 1),
        tolerance=0.0,
    )


def _dequantized(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale.repeat_interleave(GROUP, dim=1)[:, : q.shape[1]]


def quantize(p: Problem, device: str, cold: int) -> Case:
    t, d = p.number("tokens"), p.shape.d_model

    return _case(
        p,
        cold,
        lambda turn: Plain((torch.randn(t, d, device=device).bfloat16(), GROUP)),
        operations=3 * t * d,
        size=2 * t * d + t * d + 4 * t * -(-d // GROUP),
        expected=lambda inputs: inputs.args[0].float(),
        shown=lambda result, inputs: _dequantized(*result),
        tolerance=0.04 if p.op == "quantize_fp8" else 0.02,
    )


def sample_top_p(p: Problem, device: str, cold: int) -> Case:
    b, v = p.number("batch"), p.shape.vocab_size

    def make(turn: int) -> Plain:
        temperature, top_p = torch.full((b,), 0.8, device=device), torch.full((b,), 0.95, device=device)
        return Plain((4 * torch.randn(b, v, device=device), temperature, top_p, torch.rand(b, device=device)))

    return _case(p, cold, make, operations=5 * b * v, size=4 * b * v + 20 * b, tolerance=0.05)
