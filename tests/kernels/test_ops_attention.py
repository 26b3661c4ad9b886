"""rope_store_kv and paged_attention: the definitions against float64, their gradients, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS, serving
from tests.kernels.cases import FP8, Case, assert_refused, batch, ints, of, randn, refusals
from tests.kernels.oracle import assert_near, f64

FLOATS = (torch.float32, torch.bfloat16)
NAN = float("nan")
TABLE = {c: grok_kernels.rope_table(64, c, 1e4) for c in (2, 16, 64, 128)}


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on each backend, those of the rotary embedding alone also where there is no attention."""
    alone = "rope" in request.node.name or "projection_are" in request.node.name
    with serving(request.param, "rope_store_kv", *(() if alone else ("paged_attention",))):
        yield request.param


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("c", "theta"), [(2, 1e4), (64, 1e4), (128, 1e4), (128, 208533496.0)])
def test_rope_table(c: int, theta: float) -> None:
    table = f64(grok_kernels.rope_table(5000, c, theta))
    assert table.shape == (5000, c)
    for p in (0, 1, 2, 77, 4999):
        angles = np.array([p * theta ** (-2 * i / c) for i in range(c // 2)])
        bound = 1e-7 + 4e-7 * angles  # the angle is fp32
        assert (abs(table[p, : c // 2] - np.cos(angles)) <= bound).all()
        assert (abs(table[p, c // 2 :] - np.sin(angles)) <= bound).all()


def pages(count: int, groups: int, page: int, c: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
    cache = torch.full((count, groups, page, c), NAN).to(dtype)
    scale = torch.full((count, groups, page), NAN) if dtype == FP8 else None
    again = None if scale is None else scale.clone()
    return {"k_cache": cache, "v_cache": cache.clone(), "k_scale": scale, "v_scale": again}


@pytest.mark.parametrize(("dtype", "cache_dtype"), [(a, b) for a in FLOATS for b in FLOATS], ids=str)
@pytest.mark.parametrize(
    ("t", "heads", "groups", "c", "page"), [(0, 2, 1, 16, 4), (1, 3, 3, 2, 1), (7, 6, 1, 64, 3), (5, 48, 8, 128, 16)]
)
def test_rope_store_kv(
    t: int, heads: int, groups: int, c: int, page: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    q, k, v = (randn(t, n, c, seed=i, dtype=dtype) for i, n in enumerate((heads, groups, groups)))
    positions = [(11 * i) % 64 for i in range(t)]
    slots = [-1 if i == 2 else 5 * page - 1 - 2 * i for i in range(t)]
    cache = pages(5, groups, page, c, cache_dtype)
    got = grok_kernels.rope_store_kv(q, k, v, positions=ints(*positions), slots=ints(*slots), cos_sin=TABLE[c], **cache)
    table = f64(TABLE[c])
    q_exact, k_exact = oracle.rope(f64(q), positions, table), oracle.rope(f64(k), positions, table)
    assert got.dtype == dtype
    assert_near(got, q_exact, rel=2e-7)
    for name, exact in (("k_cache", k_exact), ("v_cache", f64(v))):
        expected = np.full((5 * page, groups, c), np.nan)
        expected[[s for s in slots if s >= 0]] = exact[[i for i, s in enumerate(slots) if s >= 0]]
        rel = 2e-7 + (oracle.BF16_ROUNDING if dtype != cache_dtype else 0)
        assert_near(
            cache[name].transpose(1, 2).flatten(0, 1), expected, rel=rel, size=np.abs(np.nan_to_num(expected)) + 1
        )
        if name == "v_cache":
            kept = [i for i, s in enumerate(slots) if s >= 0]
            assert same_bits(
                cache[name].transpose(1, 2).flatten(0, 1)[[slots[i] for i in kept]], v[kept].to(cache_dtype)
            )


def test_position_zero_is_left_alone_and_dot_products_depend_on_distance() -> None:
    q, k = randn(4, 1, 16), randn(4, 1, 16, seed=1)
    q[:], k[:] = q[:1].clone(), k[:1].clone()
    slots, v = ints(0, 1, 2, 3), randn(4, 1, 16)

    def rotated(x: Tensor, *positions: int) -> Tensor:
        return grok_kernels.rope_store_kv(
            x, k, v, randn(1, 1, 4, 16), randn(1, 1, 4, 16), ints(*positions), slots, TABLE[16]
        )

    assert torch.equal(rotated(q, 0, 1, 2, 3)[0], q[0])
    dots = (rotated(q, 5, 17, 40, 63) * rotated(k, 2, 14, 37, 60)).sum(-1)
    torch.testing.assert_close(dots, dots[:1].expand(4, 1), rtol=1e-5, atol=1e-5)


def test_columns_of_one_projection_are_taken_as_they_are() -> None:
    heads, groups, c, t = 6, 2, 16, 5
    qkv = randn(t, (heads + 2 * groups) * c)
    views = [x.unflatten(1, (-1, c)) for x in qkv.split((heads * c, groups * c, groups * c), dim=1)]
    results = []
    for q, k, v in (views, [x.contiguous() for x in views]):
        cache = pages(3, groups, 2, c, torch.float32)
        where = {"positions": ints(*range(t)), "slots": ints(5, 4, 0, 1, 3), "cos_sin": TABLE[c]}
        results.append((grok_kernels.rope_store_kv(q, k, v, **where, **cache), cache["k_cache"], cache["v_cache"]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rope_store_kv_fp8(dtype: torch.dtype) -> None:
    t, groups, c, page = 6, 2, 64, 4
    k, v = randn(t, groups, c, dtype=dtype), randn(t, groups, c, seed=1, dtype=dtype)
    for x in (k, v):
        x[1] *= 1e30
        x[2] *= 1e-20
        x[3] = 0
        x[4, 0, 5] = 3e38
    slots, positions = [19, 4, -1, 0, 6, 13], [0, 9, 2, 3, 0, 5]
    cache = pages(5, groups, page, c, FP8)
    grok_kernels.rope_store_kv(k, k, v, positions=ints(*positions), slots=ints(*slots), cos_sin=TABLE[c], **cache)
    exact = {"k": oracle.rope(f64(k), positions, f64(TABLE[c])), "v": f64(v)}
    for name in "kv":
        held = cache[f"{name}_cache"].transpose(1, 2).flatten(0, 1)
        scales = cache[f"{name}_scale"].transpose(1, 2).flatten(0, 1)
        unused = [s for s in range(5 * page) if s not in slots]
        assert held[unused].view(torch.uint8).eq(0x7F).all()
        assert scales[unused].isnan().all()
        for i, s in enumerate(slots):
            if s < 0:
                continue
            scale = f64(scales[s])[:, None]
            np.testing.assert_allclose(
                scale[:, 0], np.maximum(np.abs(exact[name][i]).max(-1), 2.0**-100) / 448, rtol=1e-2
            )
            error = np.abs(f64(held[s]) * scale - exact[name][i])
            rounding = 2.0**-4 + (2.0**-7 if dtype == torch.bfloat16 else 0)
            assert (error <= rounding * np.abs(exact[name][i]) + scale * 2.0**-9).all()
            if name == "v":  # not rotated: to the bit
                q8, s8 = oracle.quantize_fp8(f64(v[i]), 0)
                assert np.array_equal(held[s].view(torch.uint8).numpy(), q8.view(np.uint8))
                assert np.array_equal(scales[s].numpy(), s8[:, 0])


def run(b: Any, **flags: Any) -> Tensor:
    return grok_kernels.paged_attention(**{**b.args, **flags})


MIXED = [(1, 9), (5, 5), (1, 1), (3, 14), (4, 4), (1, 16)]  # decode, whole prompts, the last chunk of a longer one
FLAGS = [
    {},
    {"softcap": 1.5},
    {"window": 1},
    {"window": 3},
    {"window": 100},
    {"temperature_len": 8},
    {"softcap": 2.0, "window": 5, "temperature_len": 4},
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "-".join(f) or "plain")
def test_mixed_batch(flags: dict[str, Any], dtype: torch.dtype) -> None:
    b = batch(MIXED, dtype=dtype)
    before = {n: x.clone() for n, x in b.args.items() if isinstance(x, Tensor)}
    got = run(b, scale=0.4, **flags)
    assert got.dtype == dtype
    assert_near(got, b.expected(scale=0.4, **flags), rel=3e-6)
    assert all(same_bits(x, b.args[n]) for n, x in before.items())


@pytest.mark.parametrize("c", [2, 16, 64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (3, 3), (6, 1), (48, 8)])
def test_head_counts_and_sizes(heads: int, groups: int, c: int) -> None:
    b = batch([(3, 7), (1, 5)], heads, groups, c)
    assert_near(run(b, scale=c**-0.5, softcap=30.0), b.expected(scale=c**-0.5, softcap=30.0), rel=3e-6)


@pytest.mark.parametrize("cache_dtype", [*FLOATS, FP8], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_page_sizes_and_cache_types(page: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    b = batch([(2, 16), (1, 17), (20, 33)], page=page, dtype=dtype, cache_dtype=cache_dtype, seed=3)
    assert_near(run(b, scale=0.3, window=18), b.expected(scale=0.3, window=18), rel=3e-6)


@pytest.mark.parametrize("n", [15, 16, 17, 63, 65, 255, 256, 257, 600])
def test_prompts_around_and_past_blocks_of_queries(n: int) -> None:
    b = batch([(1, 3), (n, n + 40), (2, 2)], heads=2, groups=1, page=16)
    flags = {"scale": 0.5, "softcap": 20.0, "window": 200, "temperature_len": 256}
    assert_near(run(b, **flags), b.expected(**flags), rel=5e-6)


@pytest.mark.parametrize("window", [16, 64, 65])
def test_a_window_that_begins_anywhere_in_a_block_of_keys(window: int) -> None:
    b = batch([*((1, n) for n in range(63, 84)), (1, 128), (18, 140)], heads=2, groups=1, page=16)
    assert_near(run(b, scale=0.3, window=window), b.expected(scale=0.3, window=window), rel=3e-6)


@pytest.mark.parametrize("temperature_len", [2, 5, 6, 7, 8, 64])
def test_temperature_begins_past_its_length(temperature_len: int) -> None:
    b = batch([(12, 12)], seed=4)
    got = run(b, scale=0.3, temperature_len=temperature_len)
    assert_near(got, b.expected(scale=0.3, temperature_len=temperature_len), rel=3e-6)
    plain = run(b, scale=0.3)
    assert torch.equal(got[: temperature_len + 1], plain[: temperature_len + 1])
    if temperature_len < 11:
        assert not torch.allclose(got[temperature_len + 1 :], plain[temperature_len + 1 :], rtol=1e-3)


@pytest.mark.parametrize("lengths", [[], [(0, 0)], [(0, 0), (1, 5), (0, 0)], [(0, 7)], [(3, 3), (0, 4)]], ids=str)
def test_nothing_to_do(lengths: list[tuple[int, int]]) -> None:
    b = batch(lengths)
    expected = b.expected(scale=1.0) if lengths else np.empty((0, 4, 16))
    assert_near(run(b, scale=1.0), expected, rel=3e-6)


def test_window_of_one_returns_the_token_s_own_value() -> None:
    b = batch([(4, 9)], heads=2, groups=2)
    assert_near(run(b, scale=1.0, window=1), b.values[0][-4:].numpy(), rel=0)


@pytest.mark.parametrize("bound", [0, 5, 1000])
def test_max_query_len_changes_no_result(bound: int) -> None:
    b = batch(MIXED)
    assert torch.equal(run(b, scale=1.0), run(b, scale=1.0, max_query_len=bound))


def test_huge_scores_do_not_overflow() -> None:
    b = batch([(5, 9)])
    assert_near(run(b, scale=1e4), b.expected(scale=1e4), rel=2e-2)
    assert_near(run(b, scale=1e30, softcap=5.0), b.expected(scale=1e30, softcap=5.0), rel=3e-6)


def test_q_as_columns_of_one_projection() -> None:
    b = batch(MIXED)
    wide = torch.full((len(b.args["q"]), 100), NAN)
    q = wide[:, 7:71].unflatten(1, (4, 16))
    q.copy_(b.args["q"])
    assert_near(run(b, scale=1.0, q=q), b.expected(scale=1.0), rel=3e-6)


@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8], ids=str)
def test_a_request_does_not_depend_on_batch_chunks_or_pages(cache_dtype: torch.dtype) -> None:
    b = batch([(1, 30), (23, 23), (4, 9)], cache_dtype=cache_dtype)
    flags = {"scale": 0.5, "softcap": 4.0, "window": 11}
    whole = run(b, **flags)[1:24]
    k, v, table = (b.args[n] for n in ("k_cache", "v_cache", "block_table"))
    moved = torch.randperm(len(k), generator=torch.Generator().manual_seed(7))
    scales = {n: None if b.args[n] is None else b.args[n][moved] for n in ("k_scale", "v_scale")}
    row = moved.argsort()[table[1:2, :6].long()].int()
    for first, last in ((0, 23), (0, 1), (0, 10), (10, 23), (22, 23)):
        q = b.args["q"][1 + first : 1 + last]
        got = grok_kernels.paged_attention(
            q, k.view(torch.uint8)[moved].view(k.dtype), v.view(torch.uint8)[moved].view(v.dtype), row,
            ints(0, last - first), ints(last), last - first, **flags, **scales,
        )  # fmt: skip
        torch.testing.assert_close(got, whole[first:last], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flags", [{}, {"softcap": 1.5, "window": 4, "temperature_len": 4}], ids=str)
def test_gradients_through_a_fresh_cache(flags: dict[str, Any]) -> None:
    t, heads, groups, c, page, scale = 9, 4, 2, 16, 4, 0.6
    inputs = [randn(t, n, c, seed=i).requires_grad_() for i, n in enumerate((heads, groups, groups))]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    k_cache, v_cache = torch.zeros(3, groups, page, c), torch.zeros(3, groups, page, c)
    slots = ints(*(8 + i if i < 4 else i - 4 if i < 8 else 4 for i in range(t)))  # pages 2, 0, 1
    q = torch.ops.grok.rope_store_kv(
        inputs[0], inputs[1], inputs[2], k_cache, v_cache, ints(*range(t)), slots, TABLE[c], None, None
    )
    window, temperature_len, softcap = (flags.get(n, 0) for n in ("window", "temperature_len", "softcap"))
    got = torch.ops.grok.paged_attention(
        q,
        k_cache,
        v_cache,
        ints([2, 0, 1]),
        ints(0, t),
        ints(t),
        t,
        scale,
        softcap,
        window,
        temperature_len,
        None,
        None,
    )

    cos, sin = TABLE[c][:t, None].double().chunk(2, -1)

    def turn(x: Tensor) -> Tensor:
        x1, x2 = x[..., : c // 2], x[..., c // 2 :]
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)

    kk, vv = (x.repeat_interleave(heads // groups, 1) for x in (turn(exact[1]), exact[2]))
    s = scale * torch.einsum("nhc,lhc->hnl", turn(exact[0]), kk)
    s = softcap * (s / softcap).tanh() if softcap else s
    p = torch.arange(t)
    if temperature_len:
        s = (
            s
            * torch.where(p > temperature_len, p.clamp(min=1).log2() / np.log2(temperature_len), 1.0)[:, None].double()
        )
    hidden = p > p[:, None]
    if window:
        hidden |= p <= p[:, None] - window
    expected = torch.einsum("hnl,lhc->nhc", s.masked_fill(hidden, -torch.inf).softmax(-1), vv)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    weight = randn(t, heads, c, seed=8)
    grads = torch.autograd.grad((got * weight).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((expected * weight).sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("c", "name", "value", "shown"), refusals("rope_store_kv", "paged_attention"))
def test_refuses_a_wrong_argument(c: Case, name: str, value: Any, shown: str) -> None:
    assert_refused(c, name, value, shown)


ROPE, ROPE_FP8 = of("rope_store_kv")
ATTENTION, ATTENTION_FP8 = of("paged_attention")
LONE_SCALE = torch.ones(6, 2, 4)
WRONG = [
    (ROPE, "k", randn(5, 2, 16).bfloat16(), "bfloat16", "float32 as q"),
    (ROPE, "v", randn(5, 2, 16).bfloat16(), "bfloat16", "float32 as q"),
    (ROPE, "q", randn(5, 4, 15), "(5, 2, 16)", "C=15 from q"),
    *((c, n, None, f"{n} is None", "float8_e4m3fn") for c in (ROPE_FP8, ATTENTION_FP8) for n in ("k_scale", "v_scale")),
    *((c, n, LONE_SCALE, n, "None", "float32") for c in (ROPE, ATTENTION) for n in ("k_scale", "v_scale")),
    *((c, "v_cache", randn(6, 2, 4, 16).bfloat16(), "bfloat16", "float32 as k_cache") for c in (ROPE, ATTENTION)),
    (ATTENTION, "q", randn(5, 3, 16), "H=3", "G=2"),
    *((ATTENTION, "scale", x, f"scale={x}") for x in (0.0, -1.0, NAN, float("inf"))),
    *((ATTENTION, "softcap", x, f"softcap={x}") for x in (-1.0, NAN, float("inf"))),
    *((ATTENTION, n, -1, f"{n}=-1", "0 or more") for n in ("window", "temperature_len", "max_query_len")),
    (ATTENTION, "temperature_len", 1, "temperature_len=1", "at least 2"),
]  # fmt: skip


@pytest.mark.parametrize(("c", "name", "value", "shown"), [(c, n, x, s) for c, n, x, *s in WRONG])
def test_refuses_what_does_not_fit_together(c: Case, name: str, value: Any, shown: list[str]) -> None:
    assert_refused(c, name, value, *shown)


def test_rope_store_kv_refuses_an_odd_head_size() -> None:
    x, cache = randn(1, 1, 3), randn(1, 1, 1, 3)
    with pytest.raises(ValueError, match=r"rope_store_kv: q has shape \(1, 1, 3\), expected an even head size"):
        grok_kernels.rope_store_kv(x, x, x, cache, cache.clone(), ints(0), ints(0), randn(4, 3))
