"""Routing, grouping, quantisation, products and the expert layer: every backend against float64, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS, serving
from tests.kernels.cases import FP8, Case, assert_refused, ints, of, randint8, randn, refusals
from tests.kernels.oracle import assert_near, f64

FLOATS = (torch.float32, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
OPS = ("route_topk", "group_tokens", "quantize_fp8", "quantize_int8", "grouped_gemm", "moe")


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with serving(request.param, *OPS):
        yield


def columns(x: Tensor) -> Tensor:
    """The same values as columns of a wider tensor of NaN."""
    wide = torch.full((x.shape[0], x.shape[1] + 9), NAN, dtype=x.dtype)
    wide[:, 4 : 4 + x.shape[1]] = x
    return wide[:, 4 : 4 + x.shape[1]]


# Routing


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 0.7, 30.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    ("t", "d", "e", "k"), [(0, 8, 4, 2), (1, 1, 1, 1), (7, 33, 8, 2), (5, 48, 6, 6), (5, 17, 16, 1)]
)
def test_route_topk(t: int, d: int, e: int, k: int, dtype: torch.dtype, softcap: float, renormalize: bool) -> None:
    x, router = randn(t, d, dtype=dtype), randn(e, d, seed=1) * 0.4
    weights, experts = grok_kernels.route_topk(columns(x), columns(router), k, softcap, renormalize)
    exact, best = oracle.route(f64(x), f64(router), k, softcap, renormalize)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)
    assert np.array_equal(experts.numpy(), best)
    assert_near(weights, exact, rel=2e-6, size=exact)


@pytest.mark.parametrize(
    "rows", [[0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1, 0, 2], [3, 4, 4, 4, 0, 0, 3, 4]], ids=str
)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_ties_go_to_the_lower_expert(rows: list[int], k: int) -> None:
    x, distinct = randn(9, 16).round(), randn(5, 16, seed=1).round()  # whole numbers: equal logits to the bit
    weights, experts = grok_kernels.route_topk(x, distinct[rows], k)
    exact, best = oracle.route(f64(x), f64(distinct[rows]), k, 0.0, False)
    assert np.array_equal(experts.numpy(), best)
    assert_near(weights, exact, rel=3e-6, size=exact)


def test_route_weights_are_shares_of_all_experts_unless_renormalized() -> None:
    x, router = randn(6, 8), randn(5, 8, seed=1) * 0.2
    assert (grok_kernels.route_topk(x, router, 2)[0].sum(-1) < 0.999).all()
    torch.testing.assert_close(grok_kernels.route_topk(x, router, 5)[0].sum(-1), torch.ones(6))
    torch.testing.assert_close(grok_kernels.route_topk(x, router, 2, 0.0, True)[0].sum(-1), torch.ones(6))


@pytest.mark.parametrize(
    ("experts", "count"),
    [
        ([[1, 3], [0, 1], [3, 1]], 5),
        ([[2, 2], [2, 2]], 3),
        ([[0]], 1),
        ([[4, 3, 2, 1, 0]], 5),
        (np.zeros((0, 2), dtype=np.int32), 4),
        (np.random.default_rng(0).integers(0, 8, (301, 2)), 8),
    ],
    ids=lambda x: "" if isinstance(x, int) else f"{np.shape(x)}",
)
def test_group_tokens(experts: Any, count: int) -> None:
    experts = np.asarray(experts, dtype=np.int32)
    order, offsets = grok_kernels.group_tokens(torch.from_numpy(experts), count)
    assert (order.tolist(), offsets.tolist()) == oracle.group(experts, count)
    assert (order.dtype, offsets.dtype) == (torch.int32, torch.int32)


# Quantised activations

QUANTIZE = {
    "fp8": (grok_kernels.quantize_fp8, oracle.quantize_fp8),
    "int8": (grok_kernels.quantize_int8, oracle.quantize_int8),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("form", QUANTIZE)
@pytest.mark.parametrize(("t", "d"), [(0, 200), (1, 1), (3, 127), (3, 128), (2, 129), (6, 300)])
def test_quantize(t: int, d: int, form: str, group_size: int, dtype: torch.dtype) -> None:
    op, exact = QUANTIZE[form]
    x = randn(t, d, dtype=dtype)
    for row, scale in enumerate((1.0, 0.0, 1e-35, 1e37, 1e-42, 1e-20)[:t]):
        x[row] *= scale
    q, scales = op(columns(x), group_size)
    q_exact, scales_exact = exact(f64(x), group_size)
    assert tuple(scales.shape) == (t, -(-d // group_size) if group_size else 1)
    assert (q.dtype, scales.dtype) == (FP8 if form == "fp8" else torch.int8, torch.float32)
    assert np.array_equal(scales.numpy(), scales_exact)
    assert np.array_equal(f64(q), q_exact.astype(np.float64))
    assert (scales > 0).all()
    step = scales_exact.astype(np.float64).repeat(group_size or d, 1)[:, :d]
    error = np.abs(f64(q) * step - f64(x))
    bound = step * 0.5 if form == "int8" else np.abs(f64(x)) * 2.0**-4 + step * 2.0**-10
    assert (error <= bound * (1 + 1e-5) + 1e-45).all()


@pytest.mark.parametrize("form", QUANTIZE)
def test_quantize_rounds_halves_to_even(form: str) -> None:
    if form == "int8":  # with an amax of 127 the scale is 1
        x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5, 0.49999997, 2.5000002]])
        expected = [127, 0, 2, 2, 0, -2, -2, 126, 126, -126, 0, 3]
    else:  # e4m3 near 16, near 2 and below its smallest normal number
        x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.125, 2.375, 2.0**-10, 3 * 2.0**-10, 17.000002, 432.0, -448.0]])
        expected = [448, 16, 20, -16, 2, 2.5, 0, 2.0**-8, 18, 448, -448]
    q, scales = QUANTIZE[form][0](x, 0)
    assert scales.item() == 1
    assert f64(q)[0].tolist() == expected


@pytest.mark.parametrize("form", QUANTIZE)
def test_quantize_without_columns(form: str) -> None:
    for group_size, groups in ((128, 0), (0, 1)):
        q, scales = QUANTIZE[form][0](torch.zeros(3, 0), group_size)
        assert (tuple(q.shape), tuple(scales.shape)) == ((3, 0), (3, groups))


@pytest.mark.parametrize("form", QUANTIZE)
def test_an_outlier_costs_only_its_own_group(form: str) -> None:
    x = randn(1, 300)
    loud = x.clone()
    loud[0, 140] = 1e6
    (q, scales), (q_loud, scales_loud) = QUANTIZE[form][0](x, 128), QUANTIZE[form][0](loud, 128)
    keep = [i for i in range(300) if i // 128 != 1]
    assert torch.equal(q.float()[:, keep], q_loud.float()[:, keep])
    assert torch.equal(scales[:, [0, 2]], scales_loud[:, [0, 2]])


# Products


def rows(m: int, k: int, dtype: torch.dtype, per_group: bool = True) -> tuple[Tensor, Tensor | None]:
    if dtype in FLOATS:
        return randn(m, k, dtype=dtype), None
    x = randint8(m, k) if dtype == torch.int8 else randn(m, k).to(FP8)
    return x, randn(m, -(-k // 128) if per_group else 1, seed=3).abs() + 0.1


def matrices(e: int, n: int, k: int, dtype: torch.dtype, groups: int = 1, seed: int = 1) -> Weight:
    if dtype in FLOATS:
        return Weight.of(randn(e, n, k, seed=seed, dtype=dtype))
    values = randint8(e, n, k, seed=seed) if dtype == torch.int8 else randn(e, n, k, seed=seed).to(FP8)
    return Weight.of(values, randn(e, groups, n, seed=seed + 1).abs() * 0.01 + 0.001)


def optional(x: Tensor | None) -> oracle.Array | None:
    return None if x is None else f64(x)


def dequantized(weight: Weight) -> oracle.Array:
    return oracle.dequantize_weight(f64(weight.values), optional(weight.scales))


@pytest.mark.parametrize("x_dtype", [*FLOATS, torch.int8, FP8], ids=str)
@pytest.mark.parametrize(
    ("dtype", "groups"),
    [(torch.float32, 1), (torch.bfloat16, 1), (FP8, 1), (FP8, 4), (torch.int8, 1), (torch.int8, 4)],
    ids=str,
)
@pytest.mark.parametrize("out_dtype", [None, *FLOATS], ids=str)
def test_grouped_gemm(x_dtype: torch.dtype, dtype: torch.dtype, groups: int, out_dtype: torch.dtype | None) -> None:
    (x, x_scale), weight = rows(7, 140, x_dtype), matrices(4, 9, 140, dtype, groups)
    offsets = [0, 3, 3, 6, 7]  # one expert without rows
    got = grok_kernels.grouped_gemm(x, weight, ints(*offsets), x_scale, out_dtype)
    assert got.dtype == out_dtype or out_dtype is None
    if out_dtype is None:
        assert got.dtype == (x_dtype if x_dtype in FLOATS else torch.bfloat16)
    exact = oracle.gemm(oracle.dequantize_rows(f64(x), optional(x_scale)), dequantized(weight), offsets)
    assert_near(got, exact, rel=oracle.product_rel(x_dtype, dtype))


@pytest.mark.parametrize(
    ("m", "n", "k", "offsets"),
    [
        (0, 5, 16, [0, 0, 0, 0]),
        (1, 1, 1, [0, 0, 0, 1]),
        (6, 3, 200, [0, 6, 6, 6]),
        (5, 17, 33, [0, 0, 5, 5]),
        (4, 3, 8, None),
        (0, 3, 8, None),
    ],
)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.int8], ids=str)
def test_grouped_gemm_shapes(m: int, n: int, k: int, offsets: list[int] | None, x_dtype: torch.dtype) -> None:
    (x, x_scale), weight = rows(m, k, x_dtype), matrices(3 if offsets else 1, n, k, torch.int8)
    starts = None if offsets is None else ints(*offsets)
    got = grok_kernels.grouped_gemm(x, weight, starts, x_scale, torch.float32)
    exact = oracle.dequantize_rows(f64(x), optional(x_scale))
    assert_near(got, oracle.gemm(exact, dequantized(weight), offsets or [0, m]), rel=2e-6)


def test_one_scale_a_row_and_one_for_each_group_of_it() -> None:
    for per_group in (False, True):
        (x, x_scale), weight = rows(3, 300, torch.int8, per_group), matrices(1, 4, 300, torch.float32)
        exact = oracle.dequantize_rows(f64(x), optional(x_scale))
        got = grok_kernels.grouped_gemm(columns(x.float()).to(torch.int8), weight, None, x_scale, torch.float32)
        assert_near(got, oracle.gemm(exact, f64(weight.values), [0, 3]), rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_weights_dequantise_to_the_exact_product(dtype: torch.dtype, groups: int) -> None:
    """Rows of the unit matrix pick single weights, so that nothing but the product of value and scale is rounded."""
    weight = matrices(2, 5, 16, dtype, groups)
    got = grok_kernels.grouped_gemm(torch.eye(16).repeat(2, 1), weight, ints(0, 16, 32))
    exact = dequantized(weight).astype(np.float32)
    assert np.array_equal(got.view(2, 16, 5).transpose(1, 2).numpy(), exact)


def test_extreme_scales() -> None:
    x, weight = randn(3, 8), matrices(1, 4, 8, torch.int8)
    for factor in (1e-30, 1e30):
        scaled = Weight.of(weight.values, weight.scales * factor)
        assert_near(grok_kernels.grouped_gemm(x, scaled), oracle.gemm(f64(x), dequantized(scaled), [0, 3]), rel=2e-6)


# The expert layer


def choices(t: int, a: int, e: int) -> Tensor:
    noise = torch.rand(t, e, generator=torch.Generator().manual_seed(4))
    return noise.argsort(-1)[:, :a].int()


def layer(
    t: int, d: int, f: int, e: int, a: int, dtype: torch.dtype, weight_dtype: torch.dtype, groups: int = 1
) -> dict[str, Any]:
    return {
        "x": randn(t, d, dtype=dtype), "topk_weights": randn(t, a, seed=7).abs(), "experts": choices(t, a, e),
        "w13": matrices(e, 2 * f, d, weight_dtype, groups), "w2": matrices(e, d, f, weight_dtype, groups, 5),
    }  # fmt: skip


def exact_layer(c: dict[str, Any], activation: str = "gelu_tanh", act_format: str = "none") -> oracle.Array:
    w13, w2 = dequantized(c["w13"]), dequantized(c["w2"])
    bf16 = c["x"].dtype == torch.bfloat16
    return oracle.moe(f64(c["x"]), f64(c["topk_weights"]), c["experts"].numpy(), w13, w2, activation, act_format, bf16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize(
    ("weight_dtype", "groups"),
    [(torch.float32, 1), (torch.bfloat16, 1), (FP8, 2), (torch.int8, 1), (torch.int8, 4)],
    ids=str,
)
def test_moe(weight_dtype: torch.dtype, groups: int, activation: str, dtype: torch.dtype) -> None:
    c = layer(7, 24, 20, 4, 2, dtype, weight_dtype, groups)
    got = grok_kernels.moe(**c, activation=activation)
    assert got.dtype == dtype
    # in bf16 a sum next to a rounding step of act * up may go either way
    assert_near(got, exact_layer(c, activation), rel=2e-3 if dtype == torch.bfloat16 else 3e-6)


@pytest.mark.parametrize(
    ("t", "d", "f", "e", "a"), [(0, 8, 4, 2, 1), (1, 5, 3, 1, 1), (9, 7, 5, 8, 2), (3, 16, 9, 4, 4)]
)
def test_moe_shapes(t: int, d: int, f: int, e: int, a: int) -> None:
    c = layer(t, d, f, e, a, torch.float32, torch.float32)
    c["x"] = columns(c["x"])
    assert_near(grok_kernels.moe(**c), exact_layer(c), rel=3e-6)


@pytest.mark.parametrize("experts", [[[3, 3]] * 5, [[0, 1]] * 5, [[1, 0]] * 5], ids=str)
def test_moe_with_every_token_on_the_same_experts(experts: list[list[int]]) -> None:
    c = layer(5, 12, 6, 4, 2, torch.float32, torch.float32)
    c["experts"] = ints(*experts)
    idle = [e for e in range(4) if e not in experts[0]]
    expected = exact_layer(c)
    c["w13"].values[idle], c["w2"].values[idle] = NAN, NAN  # an expert without rows is not read
    assert_near(grok_kernels.moe(**c), expected, rel=3e-6)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
@pytest.mark.parametrize("size", [1e-4, 300.0, 1e8])
def test_moe_where_the_activation_is_flat_or_saturates(size: float, activation: str) -> None:
    c = layer(5, 12, 9, 3, 2, torch.float32, torch.float32)
    c["w13"].values[:, :9] *= size
    assert_near(grok_kernels.moe(**c, activation=activation), exact_layer(c, activation), rel=3e-6)


@pytest.mark.parametrize("act_format", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_moe_quantises_both_inputs_of_products(dtype: torch.dtype, act_format: str) -> None:
    """A value that fp32 carries over a rounding step costs that step, so: far closer than to the unrounded layer."""
    c = layer(4, 140, 133, 3, 2, dtype, torch.int8)
    got = grok_kernels.moe(**c, act_format=act_format)
    exact, unrounded = exact_layer(c, act_format=act_format), exact_layer(c)
    error, effect = np.linalg.norm(f64(got) - exact), np.linalg.norm(exact - unrounded)
    assert effect > 1e-3 * np.linalg.norm(exact)
    allowance = 2.0**-9 * np.linalg.norm(exact) if dtype == torch.bfloat16 else 0.0
    assert error < 0.03 * effect + allowance


def test_rows_do_not_depend_on_the_batch() -> None:
    c = layer(40, 33, 21, 4, 2, torch.float32, torch.int8)
    router = randn(8, 33, seed=9)
    whole, (weights, experts) = grok_kernels.moe(**c), grok_kernels.route_topk(c["x"], router, 2, 30.0)
    one = Weight.of(c["w13"].values[:1], c["w13"].scales[:1])
    product = grok_kernels.grouped_gemm(c["x"], one)
    for part in (slice(0, 1), slice(39, 40), slice(5, 22)):
        own = {**c, **{n: c[n][part] for n in ("x", "topk_weights", "experts")}}
        torch.testing.assert_close(grok_kernels.moe(**own), whole[part], rtol=1e-5, atol=1e-5)
        got = grok_kernels.route_topk(c["x"][part], router, 2, 30.0)
        torch.testing.assert_close(got[0], weights[part])
        assert torch.equal(got[1], experts[part])
        alone = grok_kernels.grouped_gemm(c["x"][part], one)
        torch.testing.assert_close(alone, product[part], rtol=1e-5, atol=1e-5)
        for op in (grok_kernels.quantize_fp8, grok_kernels.quantize_int8):
            assert all(
                torch.equal(a.float(), b.float()[part]) for a, b in zip(op(c["x"][part]), op(c["x"]), strict=True)
            )


# Gradients


def assert_same_gradients(got: Tensor, expected: Tensor, inputs: list[Tensor], exact: list[Tensor]) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    weight = randn(*got.shape, seed=11)
    grads = torch.autograd.grad((got * weight).sum(), inputs)
    for a, b in zip(grads, torch.autograd.grad((expected * weight.double()).sum(), exact), strict=True):
        assert b.any()
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def leaves(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return [x.clone().requires_grad_() for x in tensors], [x.double().requires_grad_() for x in tensors]


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_of_route_topk(softcap: float, renormalize: bool) -> None:
    inputs, (x, router) = leaves(randn(6, 12), randn(5, 12, seed=1))
    got, experts = torch.ops.grok.route_topk(*inputs, 2, softcap, renormalize)
    logits = x @ router.T
    p = (softcap * (logits / softcap).tanh() if softcap else logits).softmax(-1).gather(1, experts.long())
    assert not experts.requires_grad
    assert_same_gradients(got, p / p.sum(-1, keepdim=True) if renormalize else p, inputs, [x, router])


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_gradients_of_grouped_gemm(groups: int | None) -> None:
    offsets, e_of_row = ints(0, 2, 2, 6), torch.tensor([0, 0, 2, 2, 2, 2])
    weight = matrices(3, 5, 8, torch.float32 if groups is None else torch.int8, groups or 1)
    inputs, exact = leaves(randn(6, 8), weight.planes[-1])
    got = grok_kernels.grouped_gemm(inputs[0], Weight.of(*weight.planes[:-1], inputs[1]), offsets)
    w = (
        exact[1]
        if groups is None
        else weight.values.double() * exact[1].repeat_interleave(8 // groups, 1).transpose(1, 2)
    )
    assert_same_gradients(got, torch.einsum("mk,mnk->mn", exact[0], w[e_of_row]), inputs, exact)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "silu"])
def test_gradients_of_moe(activation: str) -> None:
    c = layer(6, 10, 7, 4, 2, torch.float32, torch.float32)
    c["experts"] %= 3  # the last is idle
    inputs, exact = leaves(c["x"], c["topk_weights"], c["w13"].values, c["w2"].values)
    got = grok_kernels.moe(inputs[0], inputs[1], c["experts"], *map(Weight.of, inputs[2:]), activation)
    x, weights, w13, w2 = exact
    gate, up = torch.einsum("td,tafd->taf", x, w13[c["experts"].long()]).chunk(2, -1)
    act = torch.nn.functional.silu if activation == "silu" else torch.nn.functional.gelu
    hidden = act(gate, approximate="tanh") if activation == "gelu_tanh" else act(gate)
    expected = torch.einsum("ta,taf,tadf->td", weights, hidden * up, w2[c["experts"].long()])
    assert_same_gradients(got, expected, inputs, exact)


# What is refused


@pytest.mark.parametrize(("c", "name", "value", "shown"), refusals(*OPS))
def test_refuses_a_wrong_argument(c: Case, name: str, value: Any, shown: str) -> None:
    assert_refused(c, name, value, shown)


ROUTE, GROUP, (GEMM, GEMM_INT8, GEMM_FP8), (MOE, MOE_INT8, MOE_FP8, _) = (
    of("route_topk")[0], of("group_tokens")[0], of("grouped_gemm"), of("moe"),
)  # fmt: skip
WRONG = [
    *((ROUTE, "k", k, f"k={k}", "1..E=6") for k in (0, -1, 7)),
    *((ROUTE, "softcap", x, f"softcap={x}") for x in (-1.0, NAN, INF)),
    *((GROUP, "num_experts", n, f"num_experts={n}", "1 or more") for n in (0, -3)),
    *(
        (c, "group_size", n, f"group_size={n}", "128")
        for c in of("quantize_fp8", "quantize_int8") for n in (64, -1, 256)
    ),
    *((GEMM, "out_dtype", x, f"out_dtype={x}", "torch.bfloat16") for x in (torch.float16, torch.float64, torch.int8)),
    (GEMM, "x_scale", torch.ones(5, 1), "x_scale", "None", "float32"),
    (GEMM_INT8, "x_scale", None, "None", "x of int8"),
    (GEMM_FP8, "x_scale", torch.ones(5, 3), "3 groups", "1 or 2"),
    *((c, "activation", x, f"activation={x!r}", "gelu_tanh, gelu, silu") for c in (MOE, MOE_FP8) for x in ("relu", "")),
    (MOE, "act_format", "fp4", "act_format='fp4'", "none, fp8, int8"),
    (MOE, "w13", Weight.of(randn(3, 25, 16)), "(3, 25, 16)", "F=12"),
]  # fmt: skip


@pytest.mark.parametrize(("c", "name", "value", "shown"), [(c, n, x, s) for c, n, x, *s in WRONG])
def test_refuses_what_does_not_fit_together(c: Case, name: str, value: Any, shown: list[str]) -> None:
    assert_refused(c, name, value, *shown)


def test_one_matrix_needs_no_offsets_and_several_do() -> None:
    with pytest.raises(ValueError, match=r"grouped_gemm: offsets is None, expected \(E \+ 1,\) with E=2"):
        grok_kernels.grouped_gemm(randn(3, 8), Weight.of(randn(2, 4, 8)))


def test_the_oracle_s_e4m3_is_torch_s() -> None:
    codes = np.arange(256, dtype=np.uint8)
    assert np.array_equal(
        f64(torch.from_numpy(codes).view(FP8)), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64), equal_nan=True
    )
