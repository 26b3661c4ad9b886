"""route_topk and group_tokens of the native CPU backend: against the reference, and the same bits however they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import cpu
from tests.kernels import oracle
from tests.kernels.backends import ISAS
from tests.kernels.cases import ints, randn

STATUS = grok_kernels.backends()["route_topk"]["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
NAN, INF = float("nan"), float("inf")


def route(x: Tensor, router: Tensor, k: int, backend: str = "cpu", softcap: float = 30.0) -> tuple[Tensor, Tensor]:
    with grok_kernels.use_backend(backend):
        return grok_kernels.route_topk(x, router, k, softcap, True)


def group(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    with grok_kernels.use_backend("cpu"):
        return grok_kernels.group_tokens(experts, count)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("d", "e", "k"), [(6144, 8, 2), (15, 7, 7), (16, 9, 3), (257, 64, 8), (1, 129, 129), (0, 3, 2)]
)
def test_matches_the_reference(d: int, e: int, k: int, dtype: torch.dtype, isa: str) -> None:
    x, router = randn(5, d, dtype=dtype), randn(e, d, seed=1) * 0.1
    with cpu.use_isa(isa):
        weights, experts = route(x, router, k)
    expected = route(x, router, k, "reference")
    assert torch.equal(experts, expected[1])
    torch.testing.assert_close(weights, expected[0], rtol=2e-5, atol=1e-37)  # logits to 30: half a unit of them is 1e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_nan_and_infinite_logits(softcap: float, isa: str) -> None:
    x, router = torch.eye(6, dtype=torch.bfloat16), torch.zeros(6, 6)
    router[3, 0], router[3, 1], router[0, 2], router[:, 4] = NAN, INF, -INF, -INF
    router[:, 5] = torch.tensor([1.0, 3.0, 2.0, 3.0, -3e38, 0.0])
    x[x == 0] = 2.0**-126  # times an infinity it is no NaN
    with cpu.use_isa(isa):
        weights, experts = route(x, router.nan_to_num(nan=NAN, posinf=INF, neginf=-INF), 6, softcap=softcap)
    expected = route(x, router, 6, "reference", softcap)
    torch.testing.assert_close(weights, expected[0], rtol=1e-5, atol=1e-37, equal_nan=True)
    assert torch.equal(experts, expected[1])
    assert expected[0].isnan().any()


@pytest.mark.parametrize(("d", "e", "k"), [(6144, 8, 2), (33, 64, 5), (47, 3, 1)])
def test_same_bits_from_every_instruction_set_batch_and_thread_count(d: int, e: int, k: int) -> None:
    t = 43  # odd: tokens are taken in pairs
    x, router = randn(t, d, dtype=torch.bfloat16), randn(e, d, seed=1) * 0.1
    with cpu.use_isa("portable"):
        expected = route(x, router, k)
    before = torch.get_num_threads()
    try:
        for isa in ISAS:
            with cpu.use_isa(isa):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    assert all(map(torch.equal, route(x, router, k), expected))
                for part in (slice(0, 1), slice(41, 42), slice(7, 20), slice(8, 43)):
                    alone = route(x[part], router, k)
                    assert all(torch.equal(a, b[part]) for a, b in zip(alone, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("t", "a", "e"), [(0, 2, 3), (5, 0, 3), (1, 1, 1), (1000, 8, 300), (77, 3, 2)])
def test_group_tokens_of_columns_of_a_wider_tensor(t: int, a: int, e: int) -> None:
    wide = torch.full((t, a + 5), -7, dtype=torch.int32)
    wide[:, 2 : 2 + a] = torch.randint(0, e, (t, a), generator=torch.Generator().manual_seed(0))
    experts = wide[:, 2 : 2 + a]
    order, offsets = group(experts, e)
    assert (order.tolist(), offsets.tolist()) == oracle.group(experts.numpy(), e)


@pytest.mark.parametrize("value", [-1, 4, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize(("row", "a"), [(0, 0), (2, 1)])
def test_group_tokens_refuses_an_expert_that_is_not_there(row: int, a: int, value: int) -> None:
    experts = ints([1, 3], [0, 1], [3, 1])
    experts[row, a] = value
    with pytest.raises(ValueError, match=rf"group_tokens: experts\[{row}, {a}\]={value}, expected 0..num_experts-1=3"):
        group(experts, 4)


def test_the_native_ops_check_what_memory_safety_needs() -> None:
    from grok_kernels import _C

    x, router, experts = randn(3, 8), randn(4, 8), ints([1, 3], [0, 1])
    ops = _C
    with pytest.raises(ValueError, match=r"router has shape \[4, 7\], expected \(E, D\) with D=8 from x"):
        ops.route_topk(x, router[:, :7], 2, 0.0, False)
    with pytest.raises(ValueError, match="router has dtype BFloat16, expected Float"):
        ops.route_topk(x, router.bfloat16(), 2, 0.0, False)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k={k}, expected 1..E=4"):
            ops.route_topk(x, router, k, 0.0, False)
    with pytest.raises(ValueError, match="experts has dtype Long, expected Int"):
        ops.group_tokens(experts.long(), 4)
    for count in (0, 2**31):
        with pytest.raises(ValueError, match=f"num_experts={count}, expected 1..2147483647"):
            ops.group_tokens(experts, count)
