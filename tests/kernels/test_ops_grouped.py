"""Router and grouping in one op, and the expert layer on rows grouped before: the same bits as by the ops apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight
from tests.kernels.backends import BACKENDS, serving
from tests.kernels.cases import FP8, Case, assert_refused, ints, of, randint8, randn, refusals

OPS = ("route_and_group", "route_topk", "group_tokens", "moe", "moe_fp8")


@pytest.fixture(autouse=True, params=[b for b in BACKENDS if not b.startswith("cpu")])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with serving(request.param, *OPS):
        yield


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("t", "d", "e", "k"), [(0, 8, 4, 2), (1, 1, 1, 1), (7, 36, 8, 2), (5, 48, 6, 6), (90, 16, 8, 2)]
)
def test_route_and_group_is_the_two_ops(t: int, d: int, e: int, k: int, dtype: torch.dtype) -> None:
    x, router = randn(t, d, dtype=dtype), randn(e, d, seed=1) * 0.4
    weights, experts = grok_kernels.route_topk(x, router, k, 30.0, True)
    expected = (weights, experts, *grok_kernels.group_tokens(experts, e))
    assert_same(grok_kernels.route_and_group(x, router, k, 30.0, True), expected)


def test_gradients_are_those_of_the_router() -> None:
    x, router = randn(4, 8), randn(5, 8, seed=1)
    found = []
    for op in (grok_kernels.route_topk, grok_kernels.route_and_group):
        leaf = x.clone().requires_grad_()
        weights, experts, *grouping = op(leaf, router, 2)
        assert not any(ints.requires_grad for ints in (experts, *grouping))
        (grad,) = torch.autograd.grad((weights * randn(4, 2, seed=2)).sum(), leaf)
        found.append(grad)
    assert torch.equal(*found)


def layer(weight: torch.dtype) -> dict[str, Any]:
    def matrices(n: int, k: int, seed: int) -> Weight:
        values = randint8(4, n, k, seed=seed) if weight == torch.int8 else randn(4, n, k, seed=seed).to(weight)
        return Weight.of(values, randn(4, 1, n, seed=5).abs() * 0.05 + 0.01 if weight.itemsize == 1 else None)

    return {"w13": matrices(96, 160, 1), "w2": matrices(160, 48, 2)}


@pytest.mark.parametrize("t", [0, 1, 9])
@pytest.mark.parametrize(
    ("weight", "act_format"), [(torch.int8, "none"), (FP8, "fp8"), (torch.bfloat16, "none")], ids=str
)
def test_the_layer_on_grouped_rows(weight: torch.dtype, act_format: str, t: int) -> None:
    x, router, weights = randn(t, 160, dtype=torch.bfloat16), randn(4, 160, seed=1), layer(weight)
    topk, experts, order, offsets = grok_kernels.route_and_group(x, router, 2)
    expected = grok_kernels.moe(x, topk, experts, **weights, act_format=act_format)
    got = grok_kernels.moe(x, topk, experts, **weights, act_format=act_format, order=order, offsets=offsets)
    assert_same((got,), (expected,))
    if act_format == "fp8":
        q, scale = grok_kernels.quantize_fp8(x)
        assert_same(
            (grok_kernels.moe_fp8(q, scale, topk, experts, **weights, order=order, offsets=offsets),), (expected,)
        )


def test_the_grouping_given_is_the_one_used() -> None:
    """Another order of the rows of one expert gives the same layer; an order that swaps two experts' rows does not."""
    (case,) = (c for c in of("moe") if c.name == "grouped")
    args = case.build()
    expected = grok_kernels.moe(**args)
    torch.testing.assert_close(grok_kernels.moe(**{**args, "order": args["order"][[1, 0, *range(2, 10)]]}), expected)
    assert not torch.allclose(
        grok_kernels.moe(**{**args, "order": args["order"][[3, 1, 2, 0, *range(4, 10)]]}), expected
    )


def test_a_layer_on_a_cpu_routes_and_groups_apart() -> None:
    with grok_kernels.use_backend("cpu"):
        assert not grok_kernels.fuses("route_and_group", ("route_topk", "moe"), "cpu")


GROUPED = [c for c in of("moe", "moe_fp8") if c.name == "grouped"]


@pytest.mark.parametrize(("c", "name", "value", "shown"), refusals("route_and_group"))
def test_refuses_a_wrong_argument(c: Case, name: str, value: Any, shown: str) -> None:
    assert_refused(c, name, value, shown)


@pytest.mark.parametrize("c", GROUPED, ids=str)
@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("order", None, "both or neither"),
        ("offsets", None, "both or neither"),
        ("order", ints(*range(9)), "(T·A,) with T=5 and A=2"),
        ("offsets", ints(0, 5, 10), "(E + 1,) with E=3"),
        ("order", torch.arange(10), "int64"),
        ("offsets", torch.arange(4).float(), "float32"),
    ],
    ids=str,
)
def test_refuses_a_grouping_that_does_not_fit(c: Case, name: str, value: Any, shown: str) -> None:
    assert_refused(c, name, value, shown)
