"""The row-wise ops: norms, rotation, routing, grouping, quantisation, sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import TURNS, Case, Plain, copies
from .data import routing
from .ours import reference, rope_table
from .problems import KV, PAGES, ROUTINGS, TOKENS, Problem, family

EPS, GROUP = 1e-5, 128
FP8_ERROR, INT8_ERROR = 0.04, 0.02  # of values rounded with a scale for each group


def _case(p: Problem, cold: int, make: Callable[[int], Any], operations: float, size: float, **options: Any) -> Case:
    inputs = [make(turn) for turn in range(max(TURNS, copies(size, cold)))]
    options = {"arithmetic": "fp32", "expected": lambda inputs: reference(p.op, inputs.args), **options}
    return Case(inputs=inputs, operations=operations, bytes=size, **options)


def _rows(p: Problem, device: str) -> tuple[int, int, Callable[[], Tensor]]:
    """T, D and what makes random rows (T, D) in bf16."""
    t, d = p.number("tokens"), p.shape.d_model
    return t, d, lambda: torch.randn(t, d, device=device).bfloat16()


@family("rms_norm", "t{tokens}", {"tokens": TOKENS})
def rms_norm(p: Problem, device: str, cold: int) -> Case:
    t, d, rows = _rows(p, device)
    weight_D = torch.randn(d, device=device)
    return _case(p, cold, lambda turn: Plain((rows(), weight_D, EPS)), 4 * t * d, 2 * t * d * 2 + 4 * d)


@family("sandwich_norm", "t{tokens}", {"tokens": TOKENS})
def sandwich_norm(p: Problem, device: str, cold: int, **options: Any) -> Case:
    t, d, rows = _rows(p, device)
    post, pre = (torch.randn(d, device=device) for _ in range(2))

    def make(turn: int) -> Plain:
        return Plain((rows(), rows(), post if p.shape.post_norms else None, pre, EPS))

    return _case(p, cold, make, **{"operations": 9 * t * d, "size": 4 * t * d * 2 + 8 * d, **options})


@family("sandwich_norm_fp8", "t{tokens}", {"tokens": TOKENS})
def sandwich_norm_fp8(p: Problem, device: str, cold: int) -> Case:
    t, d, _ = _rows(p, device)

    def expected(inputs: Plain) -> tuple[Tensor, Tensor, Tensor]:
        h, y = reference("sandwich_norm", inputs.args)
        return h, y, y

    def shown(result: Any, inputs: Plain) -> Any:
        return *result[:2], _dequantized(*result[2:])

    size = 4 * t * d * 2 + 8 * d + _quantized_bytes(t, d)
    options = {"expected": expected, "shown": shown, "tolerance": FP8_ERROR}
    return sandwich_norm(p, device, cold, operations=12 * t * d, size=size, **options)


class Stored(Plain):
    """Tokens to be written to successive slots, in pages of a random order."""

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

    def exact(self) -> tuple[Tensor, ...]:
        """What is due, computed in caches of its own, since the reference writes, too."""
        own = Stored(tuple(x.to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype, copy=True)
                           if isinstance(x, Tensor) else x for x in self.args))  # fmt: skip
        return reference("rope_store_kv", own.args), *own.written

    def clear(self) -> None:
        for cache in (*self.args[3:5], *self.args[8:10]):
            if cache is not None:
                cache.zero_()


@family("rope_store_kv", "{kv}-p{page}-t{tokens}", {"kv": KV, "page": PAGES, "tokens": TOKENS})
def rope_store_kv(p: Problem, device: str, cold: int) -> Case:
    t, page, m, fp8 = p.number("tokens"), p.number("page"), p.shape, p["kv"] == "fp8"
    h, g, c = m.num_heads, m.num_kv_heads, m.head_dim
    cos_sin = rope_table(max(t, 4096), c, m.rope_theta, device)
    pages, dtype = -(-t // page), torch.float8_e4m3fn if fp8 else torch.bfloat16

    def make(turn: int) -> Stored:
        q, k, v = (torch.randn(t, n, c, device=device).bfloat16() for n in (h, g, g))
        caches = [torch.zeros(pages, g, page, c, dtype=dtype, device=device) for _ in range(2)]
        scales = [torch.zeros(pages, g, page, device=device) if fp8 else None for _ in range(2)]
        order = torch.randperm(pages, device=device)
        slots = (order[:, None] * page + torch.arange(page, device=device)).flatten()[:t].int()
        positions = torch.arange(t, dtype=torch.int32, device=device)
        return Stored((q, k, v, *caches, positions, slots, cos_sin, *scales))

    size = 2 * t * (h + 2 * g) * c + 2 * t * h * c + 2 * t * g * c * (1 if fp8 else 2)
    return _case(
        p, cold, make, 3 * t * (h + g) * c, size,
        expected=Stored.exact,
        shown=lambda result, inputs: (result, *inputs.written), reset=Stored.clear,
        tolerance=FP8_ERROR if fp8 else 0.01,
    )  # fmt: skip


@family("route_topk", "t{tokens}", {"tokens": TOKENS}, "route_and_group")
def route(p: Problem, device: str, cold: int) -> Case:
    """`route_topk`, and `route_and_group`, which also writes the grouping."""
    (t, d, rows), m = _rows(p, device), p.shape
    e, a = m.num_experts, m.num_experts_per_tok
    router = torch.randn(e, d, device=device) * d**-0.5
    size = 2 * t * d + 4 * e * d + 8 * t * a + (4 * t * a + 4 * (e + 1) if p.op == "route_and_group" else 0)
    return _case(p, cold, lambda turn: Plain((rows(), router, a, m.router_softcap, m.renormalize)), 2 * t * d * e, size)


@family("group_tokens", "{routing}-t{tokens}", {"routing": ROUTINGS, "tokens": TOKENS})
def group_tokens(p: Problem, device: str, cold: int) -> Case:
    t, a, e, kind = p.number("tokens"), p.shape.num_experts_per_tok, p.shape.num_experts, str(p["routing"])
    size = 8 * t * a + 4 * (e + 1)
    return _case(p, cold, lambda turn: Plain((routing(kind, t, e, a, turn, device), e)), t * a, size, tolerance=0.0)


def _dequantized(q: Tensor, scale: Tensor) -> Tensor:
    return q.float() * scale.repeat_interleave(GROUP, dim=1)[:, : q.shape[1]]


def _quantized_bytes(t: int, d: int) -> int:
    return t * d + 4 * t * -(-d // GROUP)


@family("quantize_fp8", "t{tokens}", {"tokens": TOKENS}, "quantize_int8")
def quantize(p: Problem, device: str, cold: int) -> Case:
    t, d, rows = _rows(p, device)
    return _case(
        p, cold, lambda turn: Plain((rows(), GROUP)), 3 * t * d, 2 * t * d + _quantized_bytes(t, d),
        expected=lambda inputs: inputs.args[0].float(), shown=lambda result, inputs: _dequantized(*result),
        tolerance=FP8_ERROR if p.op == "quantize_fp8" else INT8_ERROR,
    )  # fmt: skip


@family("sample_top_p", "b{batch}", {"batch": TOKENS[:9]}, phase="decode")
def sample_top_p(p: Problem, device: str, cold: int) -> Case:
    b, v = p.number("batch"), p.shape.vocab_size

    def make(turn: int) -> Plain:
        temperature, top_p = torch.full((b,), 0.8, device=device), torch.full((b,), 0.95, device=device)
        return Plain((4 * torch.randn(b, v, device=device), temperature, top_p, torch.rand(b, device=device)))

    return _case(p, cold, make, 5 * b * v, 4 * b * v + 20 * b, tolerance=0.05)
