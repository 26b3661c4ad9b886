"""Every op of the library: schema, checks, shape of the result, and the contract in its docstring.

Read top to bottom, this file is the contract that each backend is tested against; `reference/` holds the
definitions in plain torch. The ops live in torch's namespace `grok::`, so that they trace and compile.

Activations are flat, (T, ...): T tokens of whatever requests, fp32 or bf16. Weights are K-major, (E, N, K), one
matrix an expert. Index tensors are int32; their values are checked only where an op says so. Every wrong argument is a
ValueError that names it, its value and what was expected. Where an input requires grad the reference runs, and is
differentiable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import registry
from .checks import FLOATS, FP32, GROUP, INT, SCALED, Checker

ACTIVATIONS = ("gelu_tanh", "gelu", "silu")
ACT_FORMATS = ("none", "fp8", "int8")
KV_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn)

Result = tuple[tuple[Any, ...], torch.dtype]  # shape and dtype
_lib = torch.library.Library("grok", "DEF")


def _op(schema: str) -> Callable[[Callable[..., list[Result]]], Callable[..., Any]]:
    """Define `grok::<schema>` from a function that checks the arguments and returns the results' shapes and dtypes."""
    name = schema.split("(", 1)[0]

    def define(check: Callable[..., list[Result]]) -> Callable[..., Any]:
        _lib.define(schema)
        overload = getattr(torch.ops.grok, name).default

        def fake(*args: Any) -> Any:
            like = next(a for a in args if isinstance(a, Tensor))
            results = tuple(like.new_empty(shape, dtype=dtype) for shape, dtype in check(*args))
            return results[0] if len(results) == 1 else results

        def run(*args: Any) -> Any:
            check(*args)
            return registry.call(name, *args)

        def autograd(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
                check(*args)
                with registry.use_backend("reference"):
                    return registry.call(name, *args)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)

        torch.library.register_fake(f"grok::{name}", fake, lib=_lib)
        _lib.impl(name, run, "CompositeExplicitAutograd")
        _lib.impl(name, autograd, "Autograd")

        def call(*args: Any) -> Any:
            key = None
            if not torch.compiler.is_dynamo_compiling():
                kernel, key = registry.shortcut(name, args)
                if kernel is not None:
                    return kernel.fn(*args)
            try:
                result = overload(*args)
            except RuntimeError as error:  # the dispatcher's own refusal of a type that the schema does not have
                if "Expected a value of type" not in str(error):
                    raise
                raise ValueError(" ".join(str(error).split("Declaration:")[0].split())) from None
            if key is not None:
                registry.remember(key, args)
            return result

        return call

    return define


# Norms


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y_TD = weight_D * x_TD * rsqrt(mean_D(x²) + eps), in fp32, rounded once to x's dtype.

    x (T, D) fp32 or bf16; weight (D,) fp32 or bf16, plain (not 1 + weight). Returns (T, D) of x's dtype.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    return _rms_norm(x, weight, eps)  # type: ignore[no-any-return]


@_op("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> list[Result]:
    c = Checker("rms_norm")
    c.tensor("x", x, "T D", FLOATS)
    c.tensor("weight", weight, "D", FLOATS)
    c.at_least("eps", eps, 0.0)
    return [(tuple(x.shape), x.dtype)]


def sandwich_norm(
    h: Tensor, delta: Tensor, post_weight: Tensor | None, pre_weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """h' = h + rms(delta, post_weight); y = rms(h', pre_weight): the norm after a block and the one before the next.

    post_weight None adds delta as it is (models without the norm after a block). All three intermediate results
    round to h's dtype. h, delta (T, D) fp32 or bf16, of one dtype; weights (D,) fp32 or bf16.
    Returns (h', y), both new tensors (T, D) of h's dtype: h is not written, so that gradients and graphs stay simple.
    """
    return _sandwich_norm(h, delta, post_weight, pre_weight, eps)  # type: ignore[no-any-return]


@_op("sandwich_norm(Tensor h, Tensor delta, Tensor? post_weight, Tensor pre_weight, float eps) -> (Tensor, Tensor)")
def _sandwich_norm(
    h: Tensor, delta: Tensor, post_weight: Tensor | None, pre_weight: Tensor, eps: float
) -> list[Result]:
    return [_check_sandwich("sandwich_norm", h, delta, post_weight, pre_weight, eps)] * 2


def _check_sandwich(
    op: str, h: Tensor, delta: Tensor, post_weight: Tensor | None, pre_weight: Tensor, eps: float
) -> Result:
    c = Checker(op)
    c.tensor("h", h, "T D", FLOATS)
    c.tensor("delta", delta, "T D", FLOATS)
    c.same_dtype("delta", delta, "h", h)
    if post_weight is not None:
        c.tensor("post_weight", post_weight, "D", FLOATS)
    c.tensor("pre_weight", pre_weight, "D", FLOATS)
    c.at_least("eps", eps, 0.0)
    return tuple(h.shape), h.dtype


def sandwich_norm_fp8(
    h: Tensor, delta: Tensor, post_weight: Tensor | None, pre_weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sandwich_norm`, and `quantize_fp8` of its y in groups of 128: what a router and `moe_fp8` take, in one pass.

    Arguments as those of `sandwich_norm`. Returns (h', y, q, scale): bit for bit what the backend's two ops return, q
    (T, D) float8_e4m3fn and scale (T, ⌈D/128⌉) fp32.
    """
    return _sandwich_norm_fp8(h, delta, post_weight, pre_weight, eps)  # type: ignore[no-any-return]


@_op(
    "sandwich_norm_fp8(Tensor h, Tensor delta, Tensor? post_weight, Tensor pre_weight, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def _sandwich_norm_fp8(
    h: Tensor, delta: Tensor, post_weight: Tensor | None, pre_weight: Tensor, eps: float
) -> list[Result]:
    (t, d), dtype = _check_sandwich("sandwich_norm_fp8", h, delta, post_weight, pre_weight, eps)
    scales: Result = ((t, -(-d // GROUP)), torch.float32)
    return [((t, d), dtype), ((t, d), dtype), ((t, d), torch.float8_e4m3fn), scales]


# Attention over pages


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
    rounded once to x's dtype. Token t goes to page slots[t] // S, place slots[t] % S; a slot of −1 is written nowhere.

    q (T, H, C), k and v (T, G, C), one dtype, fp32 or bf16. k_cache, v_cache (P, G, S, C): fp32 or bf16, or e4m3 with
    k_scale, v_scale (P, G, S) fp32, one scale a token and head (amax / 448, nothing saturates). positions, slots (T,)
    int32. cos_sin (L, C) fp32: cos of the C/2 angles, then sin, for positions 0..L−1 (see `rope_table`).
    The caches and scales are written in place; the cpu backend refuses positions and slots outside them, and writes
    nothing then. Source: Su et al., RoFormer, 2021 (half-rotation layout).
    """
    return _rope_store_kv(q, k, v, k_cache, v_cache, positions, slots, cos_sin, k_scale, v_scale)  # type: ignore[no-any-return]


@_op(
    "rope_store_kv(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor positions, "
    "Tensor slots, Tensor cos_sin, Tensor(c!)? k_scale, Tensor(d!)? v_scale) -> Tensor"
)
def _rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> list[Result]:
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
    return [(tuple(q.shape), q.dtype)]


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
            c.fail(f"{name} is given, expected None for a cache of {str(k_cache.dtype).removeprefix('torch.')}")


def rope_table(max_position: int, head_dim: int, theta: float, device: torch.device | str = "cpu") -> Tensor:
    """cos_sin (max_position, head_dim) fp32 for `rope_store_kv`: cos, then sin, of position · theta^(−2i/head_dim)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    inv_freq = 1.0 / torch.tensor(theta, dtype=torch.float32, device=device) ** exponents
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32, device=device), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


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
    entries past a request's last page unread; query_start (B+1,) and seq_lens (B,) int32. max_query_len is the host's
    bound on the queries of one request, for the launch; it changes no result. A NaN among the keys or values of a
    request may reach any of its queries, also those that do not see it; never another request's. The cpu backend refuses
    a query_start that does not ascend from 0 to T, and lengths and pages outside the table and the cache. Returns
    (T, H, C) of q's dtype.
    """
    return _paged_attention(  # type: ignore[no-any-return]
        q, k_cache, v_cache, block_table, query_start, seq_lens, max_query_len, scale, softcap, window,
        temperature_len, k_scale, v_scale,
    )  # fmt: skip


@_op(
    "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor query_start, "
    "Tensor seq_lens, SymInt max_query_len, float scale, float softcap, int window, int temperature_len, "
    "Tensor? k_scale, Tensor? v_scale) -> Tensor"
)
def _paged_attention(
    q: Tensor,
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
) -> list[Result]:
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
    return [(tuple(q.shape), q.dtype)]


# Routing


def route_topk(
    x: Tensor, router: Tensor, k: int, softcap: float = 0.0, renormalize: bool = False
) -> tuple[Tensor, Tensor]:
    """The k experts of each token and their weights.

    l = x · routerᵀ in fp32; with a softcap l = softcap · tanh(l / softcap); p = softmax(l) over all E; the k largest p,
    larger first, ties to the lower index; divided by their sum only where renormalize.

    x (T, D) fp32 or bf16; router (E, D) fp32. Returns weights (T, k) fp32 and experts (T, k) int32.
    """
    return _route_topk(x, router, k, softcap, renormalize)  # type: ignore[no-any-return]


@_op("route_topk(Tensor x, Tensor router, int k, float softcap, bool renormalize) -> (Tensor, Tensor)")
def _route_topk(x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool) -> list[Result]:
    return _check_route("route_topk", x, router, k, softcap)


def _check_route(op: str, x: Tensor, router: Tensor, k: int, softcap: float) -> list[Result]:
    c = Checker(op)
    c.tensor("x", x, "T D", FLOATS)
    c.tensor("router", router, "E D", FP32)
    c.at_least("softcap", softcap, 0.0)
    if not 1 <= k <= c.size("E"):
        c.fail(f"k={k}, expected 1..E={c.size('E')}")
    return [((x.shape[0], k), torch.float32), ((x.shape[0], k), torch.int32)]


def group_tokens(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The order that brings rows of one expert together, stable, and where each expert's rows start.

    experts (T, A) int32 in 0..num_experts−1; the cpu backend checks that, since it writes by them. Returns order (T·A,)
    int32, whose entry i is the flat index t·A + a of the i-th grouped row, and offsets (num_experts + 1,) int32. No host
    synchronisation.
    """
    return _group_tokens(experts, num_experts)  # type: ignore[no-any-return]


@_op("group_tokens(Tensor experts, int num_experts) -> (Tensor, Tensor)")
def _group_tokens(experts: Tensor, num_experts: int) -> list[Result]:
    c = Checker("group_tokens")
    c.tensor("experts", experts, "T A", INT)
    c.at_least("num_experts", num_experts, 1)
    return [((experts.shape[0] * experts.shape[1],), torch.int32), ((num_experts + 1,), torch.int32)]


def route_and_group(
    x: Tensor, router: Tensor, k: int, softcap: float = 0.0, renormalize: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route_topk`, and `group_tokens` of its experts: all that `moe` takes beside rows and weights, in one pass.

    Arguments as those of `route_topk`. Returns weights and experts (T, k), order (T·k,) and offsets (E + 1,): bit for bit
    what the backend's two ops return.
    """
    return _route_and_group(x, router, k, softcap, renormalize)  # type: ignore[no-any-return]


@_op(
    "route_and_group(Tensor x, Tensor router, int k, float softcap, bool renormalize) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _route_and_group(x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool) -> list[Result]:
    routing = _check_route("route_and_group", x, router, k, softcap)
    return [*routing, ((x.shape[0] * k,), torch.int32), ((router.shape[0] + 1,), torch.int32)]


# Quantised activations


def quantize_fp8(x: Tensor, group_size: int = GROUP) -> tuple[Tensor, Tensor]:
    """q = e4m3(clamp(x / scale, ±448)), scale = amax / 448 of each token's group of columns.

    x (T, D) fp32 or bf16; group_size 128, or 0 for one scale a token; a last group may be short. An amax below 2⁻¹⁰⁰
    counts as that, so no scale is 0. Returns q (T, D) float8_e4m3fn and scales (T, groups) fp32.
    """
    return _quantize_fp8(x, group_size)  # type: ignore[no-any-return]


def quantize_int8(x: Tensor, group_size: int = GROUP) -> tuple[Tensor, Tensor]:
    """q = int8(clamp(round(x / scale), ±127)), scale = amax / 127 of each token's group of columns; halves to even.

    Arguments and scales as in `quantize_fp8`. Returns q (T, D) int8 and scales (T, groups) fp32.
    """
    return _quantize_int8(x, group_size)  # type: ignore[no-any-return]


def _check_quantize(op: str, x: Tensor, group_size: int, dtype: torch.dtype) -> list[Result]:
    c = Checker(op)
    c.tensor("x", x, "T D", FLOATS)
    if group_size not in (0, GROUP):
        c.fail(f"group_size={group_size}, expected {GROUP}, or 0 for one scale a token")
    groups = -(-x.shape[1] // group_size) if group_size else 1
    return [(tuple(x.shape), dtype), ((x.shape[0], groups), torch.float32)]


@_op("quantize_fp8(Tensor x, int group_size) -> (Tensor, Tensor)")
def _quantize_fp8(x: Tensor, group_size: int) -> list[Result]:
    return _check_quantize("quantize_fp8", x, group_size, torch.float8_e4m3fn)


@_op("quantize_int8(Tensor x, int group_size) -> (Tensor, Tensor)")
def _quantize_int8(x: Tensor, group_size: int) -> list[Result]:
    return _check_quantize("quantize_int8", x, group_size, torch.int8)


# Products


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None = None,
    offsets: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[rows of e] = x[rows of e] @ weight[e]ᵀ, accumulated in fp32, with the scales of both applied exactly.

    x (M, K) fp32 or bf16, or int8 or e4m3 with x_scale (M, 1) or (M, ⌈K/128⌉) fp32. weight (E, N, K) bf16 or fp32; or
    int8 with weight_scale (E, groups, N) fp32, groups of K/groups input rows; or e4m3 with weight_scale (E, 1, N). Any but
    fp32 may come packed (`pack_weight`): the same values, the same result, sooner on a CPU.
    offsets (E+1,) int32: rows offsets[e]..offsets[e+1] belong to expert e, and the last is M; None only for E = 1, the
    dense projection; the cpu backend refuses others. Returns (M, N) of out_dtype, fp32 or bf16: by default x's dtype, or bf16 for a quantised x.
    """
    if not isinstance(out_dtype, torch.dtype | None):
        raise ValueError(f"grouped_gemm: out_dtype={out_dtype!r}, expected torch.float32, torch.bfloat16 or None")
    return _grouped_gemm(x, weight, weight_scale, offsets, x_scale, out_dtype)  # type: ignore[no-any-return]


@_op(
    "grouped_gemm(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? offsets, Tensor? x_scale, "
    "ScalarType? out_dtype) -> Tensor"
)
def _grouped_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor | None,
    offsets: Tensor | None,
    x_scale: Tensor | None,
    out_dtype: torch.dtype | None,
) -> list[Result]:
    c = Checker("grouped_gemm")
    c.tensor("x", x, "M K", FLOATS + SCALED)
    c.weight("weight", weight, "E N K", "weight_scale", weight_scale, "K")
    if offsets is not None:
        c.tensor("offsets", offsets, "E_plus_1", INT)
        if c.size("E_plus_1") != c.size("E") + 1:
            c.fail(f"offsets has shape {tuple(offsets.shape)}, expected (E + 1,) with E={c.size('E')}")
    elif c.size("E") != 1:
        c.fail(f"offsets is None, expected (E + 1,) with E={c.size('E')}")
    if x.dtype in SCALED:
        if x_scale is None:
            raise c.error(
                f"x_scale is None, expected scales (M, groups) for x of {str(x.dtype).removeprefix('torch.')}"
            )
        c.tensor("x_scale", x_scale, "M groups", FP32)
        if c.size("groups") not in (1, -(-x.shape[1] // GROUP)):
            c.fail(f"x_scale has {c.size('groups')} groups, expected 1 or {-(-x.shape[1] // GROUP)} of {GROUP} columns")
    elif x_scale is not None:
        c.fail(f"x_scale is given, expected None for x of {str(x.dtype).removeprefix('torch.')}")
    if out_dtype is not None and out_dtype not in FLOATS:
        c.fail(f"out_dtype={out_dtype}, expected torch.float32 or torch.bfloat16")
    default = torch.bfloat16 if x.dtype in SCALED else x.dtype
    return [((x.shape[0], c.size("N")), out_dtype or default)]


def moe(
    x: Tensor,
    topk_weights: Tensor,
    experts: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    activation: str = "gelu_tanh",
    act_format: str = "none",
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """y_T = Σ_a topk_weights[t, a] · w2[e] · (act(w1[e] · x_t) * (w3[e] · x_t)), e = experts[t, a]: the expert layer.

    Products accumulate in fp32, scales applied exactly; activation, product and the weighted sum in fp32. act * up
    rounds to x's dtype, as the input of the second product, and so does y. w13 stacks the gate w1 (rows 0..F−1) and the up projection w3 (rows F..2F−1). activation is gelu_tanh,
    gelu (erf) or silu. act_format "fp8" or "int8" quantises x, and act * up, per token and group of 128 first.

    x (T, D) fp32 or bf16; topk_weights (T, A) fp32; experts (T, A) int32; w13 (E, 2F, D) and w2 (E, D, F), int8, e4m3,
    bf16 or fp32, with scales and forms as in `grouped_gemm`; the cpu backend refuses experts outside 0..E−1. Returns (T, D) of x's dtype.

    order (T·A,) and offsets (E+1,) int32, both or neither: what `group_tokens` gives of these experts, as `route_and_group`
    does in the router's pass. A backend that groups rows then does not do so again; no bit changes. The cpu backend, which
    groups by parts of the batch, does not take them.
    """
    grouping = () if order is None and offsets is None else (order, offsets)
    return _moe(  # type: ignore[no-any-return]
        x, topk_weights, experts, w13, w13_scale, w2, w2_scale, activation, act_format, *grouping
    )


# Left out, order and offsets reach no kernel: one without use for them has neither to look at.
@_op(
    "moe(Tensor x, Tensor topk_weights, Tensor experts, Tensor w13, Tensor? w13_scale, Tensor w2, Tensor? w2_scale, "
    "str activation, str act_format, Tensor? order=None, Tensor? offsets=None) -> Tensor"
)
def _moe(
    x: Tensor,
    topk_weights: Tensor,
    experts: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    activation: str,
    act_format: str,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> list[Result]:
    c = Checker("moe")
    c.tensor("x", x, "T D", FLOATS)
    _check_layer(c, topk_weights, experts, w13, w13_scale, w2, w2_scale, activation, order, offsets)
    c.one_of("act_format", act_format, ACT_FORMATS)
    return [(tuple(x.shape), x.dtype)]


def _check_layer(
    c: Checker, topk_weights: Tensor, experts: Tensor, w13: Tensor, w13_scale: Tensor | None, w2: Tensor,
    w2_scale: Tensor | None, activation: str, order: Tensor | None, offsets: Tensor | None,
) -> None:  # fmt: skip
    c.tensor("topk_weights", topk_weights, "T A", FP32)
    c.tensor("experts", experts, "T A", INT)
    c.weight("w2", w2, "E D F", "w2_scale", w2_scale, "F")
    c.weight("w13", w13, "E 2F D", "w13_scale", w13_scale, "D")
    if c.size("2F") != 2 * c.size("F"):
        c.fail(f"w13 has shape {tuple(w13.shape)}, expected (E, 2F, D) with F={c.size('F')} from w2")
    c.same_dtype("w13", w13, "w2", w2)
    c.one_of("activation", activation, ACTIVATIONS)
    if order is None and offsets is None:
        return
    if order is None or offsets is None:
        missing, given = ("order", "offsets") if order is None else ("offsets", "order")
        raise c.error(f"{missing} is None, expected both or neither, and {given} is given")
    c.tensor("order", order, "TA", INT)
    if c.size("TA") != c.size("T") * c.size("A"):
        c.fail(f"order has shape {tuple(order.shape)}, expected (T·A,) with T={c.size('T')} and A={c.size('A')}")
    c.tensor("offsets", offsets, "E_plus_1", INT)
    if c.size("E_plus_1") != c.size("E") + 1:
        c.fail(f"offsets has shape {tuple(offsets.shape)}, expected (E + 1,) with E={c.size('E')}")


def moe_fp8(
    x: Tensor,
    x_scale: Tensor,
    topk_weights: Tensor,
    experts: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    activation: str = "gelu_tanh",
    out_dtype: torch.dtype = torch.bfloat16,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """`moe` with act_format "fp8" on rows that are quantised already, as by `sandwich_norm_fp8` or `quantize_fp8`.

    x (T, D) float8_e4m3fn and x_scale (T, ⌈D/128⌉) fp32; all else as in `moe`. Returns (T, D) of out_dtype, fp32 or bf16:
    bit for bit what the backend's `moe` returns of the rows, of that type, that x was quantised from.
    """
    if not isinstance(out_dtype, torch.dtype):
        raise ValueError(f"moe_fp8: out_dtype={out_dtype!r}, expected torch.float32 or torch.bfloat16")
    grouping = () if order is None and offsets is None else (order, offsets)
    return _moe_fp8(  # type: ignore[no-any-return]
        x, x_scale, topk_weights, experts, w13, w13_scale, w2, w2_scale, activation, out_dtype, *grouping
    )


@_op(
    "moe_fp8(Tensor x, Tensor x_scale, Tensor topk_weights, Tensor experts, Tensor w13, Tensor? w13_scale, Tensor w2, "
    "Tensor? w2_scale, str activation, ScalarType out_dtype, Tensor? order=None, Tensor? offsets=None) -> Tensor"
)
def _moe_fp8(
    x: Tensor,
    x_scale: Tensor,
    topk_weights: Tensor,
    experts: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    order: Tensor | None = None,
    offsets: Tensor | None = None,
) -> list[Result]:
    c = Checker("moe_fp8")
    c.tensor("x", x, "T D", (torch.float8_e4m3fn,))
    c.tensor("x_scale", x_scale, "T groups", FP32)
    if c.size("groups") != -(-x.shape[1] // GROUP):
        c.fail(f"x_scale has {c.size('groups')} groups, expected {-(-x.shape[1] // GROUP)} of {GROUP} columns")
    _check_layer(c, topk_weights, experts, w13, w13_scale, w2, w2_scale, activation, order, offsets)
    if out_dtype not in FLOATS:
        c.fail(f"out_dtype={out_dtype}, expected torch.float32 or torch.bfloat16")
    return [(tuple(x.shape), out_dtype)]


# Sampling


def sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """One token a row: softmax(logits / temperature), cut to the smallest set of probability top_p, then by inverse CDF.

    The most probable tokens are kept until their sum reaches top_p (the first always is); the token is the first, in
    order of falling probability, whose running sum exceeds uniform · the kept sum. Ties go to the lower index. Sums are
    in fp64. A temperature of 0 is the largest logit, and so is a row without a distribution: one with a NaN, which counts
    as the largest, or whose largest logit is infinite. A row's token depends on that row alone.

    logits (B, V) fp32 or bf16; temperature, top_p, uniform (B,) fp32, in [0, ∞), (0, 1] and [0, 1). Returns (B,) int64.
    """
    return _sample_top_p(logits, temperature, top_p, uniform)  # type: ignore[no-any-return]


@_op("sample_top_p(Tensor logits, Tensor temperature, Tensor top_p, Tensor uniform) -> Tensor")
def _sample_top_p(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> list[Result]:
    c = Checker("sample_top_p")
    c.tensor("logits", logits, "B V", FLOATS)
    c.at_least("V of logits", c.size("V"), 1)
    c.tensor("temperature", temperature, "B", FP32)
    c.tensor("top_p", top_p, "B", FP32)
    c.tensor("uniform", uniform, "B", FP32)
    return [((logits.shape[0],), torch.int64)]
