"""Router and grouping for Hopper, run by the host emulation: against the float64 oracle, and the same bits however
run."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from tests.kernels import oracle
from tests.kernels.cases import ints, randn
from tests.kernels.cuda.emulation import CSRC, HERE, call, compiled

SOURCES = (CSRC / "cuda/route/instantiations/route.cu", HERE / "route_emulated.cpp")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
NAN, INF = float("nan"), float("inf")
P, I64 = ctypes.c_void_p, ctypes.c_int64


class RouteTopk(ctypes.Structure):
    _fields_ = (
        ("x", P), ("x_is_float", ctypes.c_bool), ("router", P), ("weights", P), ("chosen", P),
        ("tokens", I64), ("dim", I64), ("experts", I64), ("k", I64), ("x_stride", I64),
        ("softcap", ctypes.c_float), ("renormalize", ctypes.c_bool),
    )  # fmt: skip


class GroupTokens(ctypes.Structure):
    _fields_ = (("chosen", P), ("order", P), ("offsets", P), ("rows", I64), ("experts", I64))


class RouteAndGroup(ctypes.Structure):
    _fields_ = (("route", RouteTopk), ("order", P), ("offsets", P), ("counter", P))


class Emulated:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.library.set_seed.argtypes = (ctypes.c_uint64,)

    def seed(self, seed: int) -> None:
        self.library.set_seed(seed)

    def _call(self, name: str, params: ctypes.Structure) -> None:
        call(getattr(self.library, name), ctypes.byref(params))

    def _route(
        self, x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool
    ) -> tuple[Any, Tensor, Tensor]:
        weights, chosen = torch.full((len(x) + 1, k), NAN), torch.full((len(x) + 1, k), -7, dtype=torch.int32)
        params = RouteTopk(
            x.data_ptr(), x.dtype == torch.float32, router.data_ptr(), weights.data_ptr(), chosen.data_ptr(),
            *x.shape, len(router), k, x.stride(0), softcap, renormalize,
        )  # fmt: skip
        return params, weights, chosen

    def route(
        self, x: Tensor, router: Tensor, k: int, softcap: float = 30.0, renormalize: bool = True
    ) -> tuple[Tensor, Tensor]:
        params, weights, chosen = self._route(x, router, k, softcap, renormalize)
        self._call("route_topk", params)
        assert weights[-1].isnan().all()  # no write past the last token
        assert (chosen[-1] == -7).all()
        return weights[:-1], chosen[:-1]

    def group(self, experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
        order, offsets = ints(*[-7] * (experts.numel() + 1)), ints(*[-7] * (count + 2))
        params = GroupTokens(experts.data_ptr(), order.data_ptr(), offsets.data_ptr(), experts.numel(), count)
        self._call("group_tokens", params)
        assert order[-1] == -7
        assert offsets[-1] == -7
        return order[:-1], offsets[:-1]

    def both(self, x: Tensor, router: Tensor, k: int) -> tuple[Tensor, ...]:
        params, weights, chosen = self._route(x, router, k, 30.0, False)
        order, offsets, counter = ints(*[-7] * len(x) * k), ints(*[-7] * (len(router) + 1)), ints(0)
        self._call("route_and_group", RouteAndGroup(params, order.data_ptr(), offsets.data_ptr(), counter.data_ptr()))
        assert counter.tolist() == [0]
        return weights[:-1], chosen[:-1], order, offsets


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(compiled(tmp_path_factory.mktemp("route") / "route.so", *SOURCES, optimise="-O1"))


def reference(x: Tensor, router: Tensor, k: int, softcap: float, renormalize: bool) -> tuple[Tensor, Tensor]:
    with grok_kernels.use_backend("reference"):
        return grok_kernels.route_topk(x, router, k, softcap, renormalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("d", "e", "k"), [(6144, 8, 2), (1028, 7, 7), (4, 9, 3), (256, 64, 8), (260, 33, 5), (4, 1, 1)]
)
def test_route_topk_matches_the_oracle(emulated: Emulated, d: int, e: int, k: int, dtype: torch.dtype) -> None:
    x, router = randn(3, d, dtype=dtype), randn(e, d, seed=1) * 0.05
    for softcap, renormalize in ((30.0, True), (0.0, False)):
        weights, experts = emulated.route(x, router, k, softcap, renormalize)
        exact = oracle.route(oracle.f64(x), oracle.f64(router), k, softcap, renormalize)
        oracle.assert_near(weights, exact[0], rel=1e-5)
        assert experts.tolist() == exact[1].tolist()


def test_ties_go_to_the_lower_index(emulated: Emulated) -> None:
    router = randn(1, 8, seed=1).repeat(40, 1)
    router[35] = router[5] = router[0] * 2
    x = router[:1].clone()
    assert emulated.route(x, router, 6)[1].tolist() == [[5, 35, 0, 1, 2, 3]]


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_nan_and_infinite_logits(emulated: Emulated, softcap: float) -> None:
    x, router = torch.zeros(6, 8), torch.zeros(6, 8)
    x[0, 0], x[1, 1], x[2, 1], x[3, 1], x[4, 2], x[5, 3] = NAN, INF, -INF, 3e38, 3e38, 1.0
    router[:, 1] = torch.tensor([0.5, 1.0, -1.0, 2.0, 3.0, -2.0])
    router[:, 2] = -3e38  # all logits are -inf
    router[:, 3] = torch.tensor([0.5, -3e38, 0.0, 0.5, -1.0, 0.25])
    weights, experts = emulated.route(x, router, 6, softcap, False)
    expected = reference(x, router, 6, softcap, False)
    torch.testing.assert_close(weights, expected[0], rtol=1e-5, atol=1e-37, equal_nan=True)
    assert torch.equal(experts, expected[1])
    assert expected[0].isnan().any()
    assert not expected[0].isnan().all()


@pytest.mark.parametrize("k", [1, 2])
def test_a_token_has_the_same_bits_in_every_batch(emulated: Emulated, k: int) -> None:
    x, router = randn(259, 516, dtype=torch.bfloat16), randn(8, 516, seed=1) * 0.1  # above 256, eight tokens a block
    many = emulated.route(x, router, k)
    for part in (slice(0, 1), slice(3, 9), slice(256, 259)):
        alone = emulated.route(x[part], router, k)
        assert all(torch.equal(a, b[part]) for a, b in zip(alone, many, strict=True))


def test_rows_of_a_wider_tensor(emulated: Emulated) -> None:
    wide, router = randn(3, 64, dtype=torch.bfloat16), randn(8, 32, seed=1)
    got = emulated.route(wide[:, 16:48], router, 2)
    assert all(map(torch.equal, got, emulated.route(wide[:, 16:48].contiguous(), router, 2)))


def spread(n: int, e: int) -> Tensor:
    return torch.randint(0, e, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.int32)


@pytest.mark.parametrize(("n", "e"), [(0, 3), (1, 1), (31, 2), (257, 64), (1000, 8), (4096, 8), (4097, 8), (9000, 33)])
def test_group_tokens_matches_the_oracle(emulated: Emulated, n: int, e: int) -> None:
    for experts in (spread(n, e), torch.full((n,), e - 1, dtype=torch.int32)):
        order, offsets = emulated.group(experts, e)
        assert (order.tolist(), offsets.tolist()) == oracle.group(experts.numpy(), e)


def test_group_tokens_skips_an_expert_that_is_not_there(emulated: Emulated) -> None:
    order, offsets = emulated.group(ints(1, -1, 0, 4, 2**31 - 1, 3, 64, 1), 4)
    assert order[:4].tolist() == [2, 0, 7, 5]
    assert (order[4:] == -7).all()
    assert offsets.tolist() == [0, 1, 3, 3, 4]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("t", [0, 1, 7, 64, 257, 513])  # one launch of one token a block, of eight, and two launches
def test_route_and_group_is_both_whatever_the_order_of_threads(emulated: Emulated, t: int, seed: int) -> None:
    x, router = randn(t, 8, dtype=torch.bfloat16), randn(8, 8, seed=1)
    emulated.seed(0)
    weights, experts = emulated.route(x, router, 2, 30.0, False)
    emulated.seed(seed)
    try:
        got = emulated.both(x, router, 2)
    finally:
        emulated.seed(0)
    assert torch.equal(got[0], weights)
    assert torch.equal(got[1], experts)
    assert (got[2].tolist(), got[3].tolist()) == oracle.group(np.asarray(experts), 8)


BAD: list[tuple[str, Callable[[Emulated], object]]] = [
    ("D=6, expected a multiple of 4", lambda m: m.route(randn(2, 6), randn(8, 6), 2)),
    ("E=65, expected 1..64", lambda m: m.route(randn(2, 8), randn(65, 8), 2)),
    ("k=9, expected 1..8", lambda m: m.route(randn(2, 8), randn(16, 8), 9)),
    ("k=4, expected 1..3", lambda m: m.route(randn(2, 8), randn(3, 8), 4)),
    ("x_stride=9, expected a multiple of 4", lambda m: m.route(randn(2, 9)[:, :8], randn(3, 8), 2)),
    ("x is not aligned to 16 bytes", lambda m: m.route(randn(2, 12)[:, 1:9], randn(3, 8), 2)),
    ("group_tokens of rows=1 E=65: E=65, expected 1..64", lambda m: m.group(ints(0), 65)),
]


@pytest.mark.parametrize(("message", "call"), BAD)
def test_the_launchers_refuse_with_the_shape(
    emulated: Emulated, message: str, call: Callable[[Emulated], object]
) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(emulated)
