"""What is quantised in the norm before the experts: the same bits as by the ops apart, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight
from tests.kernels.backends import BACKENDS, serving
from tests.kernels.cases import FP8, Case, assert_refused, ints, of, randint8, randn, refusals
from tests.kernels.oracle import f64

DTYPES = (torch.float32, torch.bfloat16)
NAN = float("nan")


@pytest.fixture(autouse=True, params=[b for b in BACKENDS if b in ("reference", "triton")])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with serving(request.param, "sandwich_norm_fp8", "moe_fp8"):
        yield


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(f64(a), f64(b), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("t", "d", "post"), [(0, 8, True), (1, 1, True), (3, 128, False), (5, 200, True), (2, 1000, True)]
)
def test_sandwich_norm_fp8_is_the_two_ops(t: int, d: int, post: bool, dtype: torch.dtype) -> None:
    h, delta = randn(t, d + 3, dtype=dtype)[:, :d], randn(t, d, seed=1, dtype=dtype)
    weights = randn(d, seed=2) if post else None, randn(d, seed=3, dtype=torch.bfloat16)
    sums, y = grok_kernels.sandwich_norm(h, delta, *weights)
    assert_same(grok_kernels.sandwich_norm_fp8(h, delta, *weights), (sums, y, *grok_kernels.quantize_fp8(y)))


def test_rows_of_zeros_and_nan() -> None:
    h, weight = randn(4, 260), torch.ones(260)
    h[1], h[2, 200] = 0, NAN
    delta = torch.zeros_like(h)
    sums, y, q, scale = grok_kernels.sandwich_norm_fp8(h, delta, None, weight)
    q2, scale2 = grok_kernels.quantize_fp8(y)
    rows = [0, 1, 3]
    assert_same((sums[rows], q[rows], scale[rows]), (h[rows], q2[rows], scale2[rows]))
    assert scale[2].isnan().all()


def rows_and_weights(weight: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Weight, ...]]:
    def matrices(n: int, k: int, seed: int) -> Weight:
        if weight == torch.int8:
            return Weight.of(randint8(3, n, k, seed=seed), randn(3, 2, n, seed=seed).abs() * 0.02)
        w = randn(3, n, k, seed=seed).to(weight)
        return Weight.of(w, randn(3, 1, n, seed=seed).abs() if weight == FP8 else None)

    topk, experts = randn(5, 2, seed=7).abs(), ints([1, 0], [2, 1], [0, 2], [1, 2], [0, 1])
    return (topk, experts), (matrices(2 * 24, 144, 1), matrices(144, 24, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [FP8, torch.int8, torch.bfloat16], ids=str)
def test_moe_fp8_is_moe_of_the_rows_before(weight: torch.dtype, dtype: torch.dtype) -> None:
    x = randn(5, 144, dtype=dtype)
    routing, weights = rows_and_weights(weight)
    q, scale = grok_kernels.quantize_fp8(x)
    expected = grok_kernels.moe(x, *routing, *weights, "silu", "fp8")
    got = grok_kernels.moe_fp8(q, scale, *routing, *weights, "silu", dtype)
    assert_same((got,), (expected,))


def test_a_layer_from_norm_to_experts_in_bf16() -> None:
    h, delta, weight = randn(5, 144, dtype=torch.bfloat16), randn(5, 144, seed=1, dtype=torch.bfloat16), torch.ones(144)
    routing, weights = rows_and_weights(FP8)
    _, y, q, scale = grok_kernels.sandwich_norm_fp8(h, delta, weight, weight)
    got = grok_kernels.moe_fp8(q, scale, *routing, *weights)
    assert_same((got,), (grok_kernels.moe(y, *routing, *weights, act_format="fp8"),))


def test_a_backend_without_them_says_so() -> None:
    x = randn(2, 8)
    with grok_kernels.use_backend("cpu"), pytest.raises(NotImplementedError, match=r"sandwich_norm_fp8 on c.*cpu: "):
        grok_kernels.sandwich_norm_fp8(x, x, None, torch.ones(8))


@pytest.mark.parametrize(("c", "name", "value", "shown"), refusals("sandwich_norm_fp8", "moe_fp8"))
def test_refuses_a_wrong_argument(c: Case, name: str, value: object, shown: str) -> None:
    assert_refused(c, name, value, shown)


MOE, _ = of("moe_fp8")
WRONG = [
    ("x", randn(5, 200), "float32", "float8_e4m3fn"),
    ("x_scale", torch.ones(5, 1), "1 groups", "2 of 128"),
    ("out_dtype", torch.float16, "out_dtype=torch.float16"),
    ("out_dtype", None, "out_dtype=None"),
    ("activation", "relu", "activation='relu'", "gelu_tanh, gelu, silu"),
]


@pytest.mark.parametrize(("name", "value", "shown"), [(n, x, s) for n, x, *s in WRONG])
def test_refuses_what_does_not_fit_together(name: str, value: object, shown: list[str]) -> None:
    assert_refused(MOE, name, value, *shown)
