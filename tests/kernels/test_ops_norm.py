"""rms_norm and sandwich_norm: every backend against float64, their gradients, and what they refuse."""

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
from tests.kernels.cases import Case, assert_refused, of, randn, refusals
from tests.kernels.oracle import assert_near, f64

DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with serving(request.param, "rms_norm", "sandwich_norm"):
        yield


def elementwise(got: Tensor, exact: oracle.Array) -> None:
    assert_near(got, exact, rel=1e-6, size=np.abs(exact))


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("t", [0, 1, 5])
@pytest.mark.parametrize("d", [1, 2, 7, 48, 129, 1000])
def test_rms_norm(d: int, t: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    x, weight = randn(t, d, dtype=dtype), randn(d, seed=1, dtype=weight_dtype)
    got = grok_kernels.rms_norm(x, weight, EPS)
    assert got.dtype == dtype
    elementwise(got, oracle.rms(f64(x), f64(weight), EPS))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5, 10.0])
def test_rms_norm_eps_is_inside_the_root(eps: float) -> None:
    x, weight = randn(3, 16) * 0.1, randn(16, seed=1)
    elementwise(grok_kernels.rms_norm(x, weight, eps), oracle.rms(f64(x), f64(weight), eps))


def test_rms_norm_by_default_has_eps_1e_5() -> None:
    x, weight = randn(3, 16) * 1e-3, randn(16, seed=1)
    elementwise(grok_kernels.rms_norm(x, weight), oracle.rms(f64(x), f64(weight), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4, 1e15])
def test_rms_norm_of_extreme_rows(scale: float, dtype: torch.dtype) -> None:
    x, weight = (randn(3, 33) * scale).to(dtype), randn(33, seed=1)
    elementwise(grok_kernels.rms_norm(x, weight, EPS), oracle.rms(f64(x), f64(weight), EPS))


def test_rms_norm_of_zeros_is_zero_and_weight_is_plain() -> None:
    assert not grok_kernels.rms_norm(torch.zeros(2, 8), torch.ones(8), EPS).any()
    ones = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert torch.equal(
        grok_kernels.rms_norm(ones, torch.tensor([0.0, 1.0, 2.0, -3.0]), 0.0)[0], torch.tensor([0.0, -1, 2, 3])
    )


def test_rms_norm_rounds_once() -> None:
    """In bf16 x / rms and then · weight, each rounded, would differ in these."""
    x, weight = randn(40, 64, dtype=torch.bfloat16), randn(64, seed=1, dtype=torch.bfloat16)
    exact = oracle.rms(f64(x), f64(weight), EPS)
    assert (grok_kernels.rms_norm(x, weight, EPS) == torch.from_numpy(exact).bfloat16()).float().mean() > 0.999


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_strided_rows_leaves_what_lies_between_unread(dtype: torch.dtype) -> None:
    wide = torch.full((9, 64), float("nan"), dtype=dtype)
    wide[:, 5:42] = randn(9, 37, dtype=dtype)
    before = wide.clone()
    weight = randn(37, seed=1)
    x = wide[::2, 5:42]
    elementwise(grok_kernels.rms_norm(x, weight, EPS), oracle.rms(f64(x), f64(weight), EPS))
    torch.testing.assert_close(wide, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("post", [None, *DTYPES], ids=str)
@pytest.mark.parametrize(("t", "d"), [(0, 8), (1, 1), (1, 48), (6, 7), (5, 200)])
def test_sandwich_norm(t: int, d: int, post: torch.dtype | None, dtype: torch.dtype) -> None:
    h, delta = randn(t, d, dtype=dtype), randn(t, d, seed=1, dtype=dtype) * 3
    post_weight = None if post is None else randn(d, seed=2, dtype=post)
    pre_weight = randn(d, seed=3)
    before = h.clone(), delta.clone()
    sums, y = grok_kernels.sandwich_norm(h, delta, post_weight, pre_weight, EPS)
    added = f64(delta) if post_weight is None else oracle.rms(f64(delta), f64(post_weight), EPS)
    size = np.abs(f64(h)) + np.abs(added)
    assert_near(sums, f64(h) + added, rel=1e-6 + (oracle.BF16_ROUNDING if dtype == torch.bfloat16 else 0.0), size=size)
    elementwise(y, oracle.rms(f64(sums), f64(pre_weight), EPS))  # of h' as it was rounded
    assert (sums.dtype, y.dtype) == (dtype, dtype)
    assert torch.equal(h, before[0])
    assert torch.equal(delta, before[1])
    assert sums.data_ptr() != h.data_ptr() or not t


def test_sandwich_norm_rounds_what_it_adds() -> None:
    """Where h is minus the rounded norm of delta, the sum is exactly 0."""
    delta, weight = randn(20, 64, dtype=torch.bfloat16), randn(64, seed=1)
    h = -torch.from_numpy(oracle.rms(f64(delta), f64(weight), EPS)).bfloat16()
    sums, _ = grok_kernels.sandwich_norm(h, delta, weight, weight, EPS)
    assert (sums == 0).float().mean() > 0.998


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sandwich_norm_of_columns_of_wider_tensors(dtype: torch.dtype) -> None:
    wide, weight = randn(4, 100, dtype=dtype), randn(40, seed=1)
    h, delta = wide[:, 3:43], wide[:, 50:90]
    got = grok_kernels.sandwich_norm(h, delta, weight, weight, EPS)
    for a, b in zip(
        got, grok_kernels.sandwich_norm(h.contiguous(), delta.contiguous(), weight, weight, EPS), strict=True
    ):
        assert torch.equal(a, b)


def test_rows_do_not_depend_on_the_batch() -> None:
    h, delta, weight = randn(70, 333), randn(70, 333, seed=1), randn(333, seed=2)
    y, (sums, z) = grok_kernels.rms_norm(h, weight), grok_kernels.sandwich_norm(h, delta, weight, weight)
    for rows in (slice(0, 1), slice(69, 70), slice(11, 30)):
        alone = grok_kernels.sandwich_norm(h[rows], delta[rows], weight, weight)
        for got, expected in zip((grok_kernels.rms_norm(h[rows], weight), *alone), (y, sums, z), strict=True):
            torch.testing.assert_close(got, expected[rows], rtol=1e-6, atol=1e-7)


def plain_rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()


def assert_same_gradients(got: Any, expected: Any, inputs: list[Tensor], exact: list[Tensor]) -> None:
    got = torch.autograd.grad(sum((g * randn(*g.shape, seed=9 + i)).sum() for i, g in enumerate(got)), inputs)
    loss = sum((g * randn(*g.shape, seed=9 + i).double()).sum() for i, g in enumerate(expected))
    for a, b in zip(got, torch.autograd.grad(loss, exact), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("post", [True, False])
def test_gradients(post: bool) -> None:
    inputs = [randn(5, 40), randn(5, 40, seed=1), randn(40, seed=2), randn(40, seed=3)]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    (h, delta, w_post, w_pre), (h64, delta64, post64, pre64) = inputs, exact
    got = [torch.ops.grok.rms_norm(h, w_post, EPS)]
    got += torch.ops.grok.sandwich_norm(h, delta, w_post if post else None, w_pre, EPS)
    sums = h64 + (plain_rms(delta64, post64) if post else delta64)
    assert_same_gradients(got, [plain_rms(h64, post64), sums, plain_rms(sums, pre64)], inputs, exact)


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    x, weight = randn(2, 8).requires_grad_(), randn(8)
    with torch.no_grad():
        assert not grok_kernels.rms_norm(x, weight).requires_grad
    assert not grok_kernels.rms_norm(x.detach(), weight).requires_grad
    assert grok_kernels.rms_norm(x.detach(), weight.requires_grad_()).requires_grad


@pytest.mark.parametrize(("c", "name", "value", "shown"), refusals("rms_norm", "sandwich_norm"))
def test_refuses_a_wrong_argument(c: Case, name: str, value: Any, shown: str) -> None:
    assert_refused(c, name, value, shown)


@pytest.mark.parametrize("c", of("rms_norm", "sandwich_norm"), ids=str)
@pytest.mark.parametrize("eps", [-1e-5, -1.0, float("nan"), float("inf")])
def test_refuses_a_wrong_eps(c: Case, eps: float) -> None:
    assert_refused(c, "eps", eps, f"eps={eps}", "0.0 or more" if eps < 0 else "finite")


def test_sandwich_norm_refuses_two_dtypes() -> None:
    c = of("sandwich_norm")[0]
    assert_refused(c, "delta", c.build()["delta"].bfloat16(), "bfloat16", "float32 as h")
