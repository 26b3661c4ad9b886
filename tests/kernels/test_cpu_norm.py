"""sandwich_norm of the native CPU backend: against the reference, and the same bits from every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import cpu
from tests.kernels.cases import randn

STATUS = grok_kernels.backends()["sandwich_norm"]["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
ISAS = cpu.isas() if STATUS.available else ()
DTYPES = (torch.float32, torch.bfloat16)
EPS = 1e-5


def run(backend: str, *args: Any) -> tuple[Tensor, Tensor]:
    with grok_kernels.use_backend(backend):
        return grok_kernels.sandwich_norm(*args, EPS)


def whole(x: Tensor) -> Tensor:
    """Its bits; the sign and payload of a NaN are no part of the contract."""
    return (
        torch.where(x.isnan(), torch.nan, x)
        .contiguous()
        .view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)
    )


def weights(d: int, post: torch.dtype | None, pre: torch.dtype) -> tuple[Tensor | None, Tensor]:
    return None if post is None else randn(d, seed=2, dtype=post), randn(d, seed=3, dtype=pre)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pre", DTYPES, ids=str)
@pytest.mark.parametrize("post", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("t", "d"), [(3, 0), (4, 1), (5, 31), (3, 6144)])
def test_matches_the_reference(
    t: int, d: int, dtype: torch.dtype, post: torch.dtype | None, pre: torch.dtype, isa: str
) -> None:
    args = randn(t, d, dtype=dtype), randn(t, d, seed=1, dtype=dtype), *weights(d, post, pre)
    if d > 40:
        args[0][0, 7], args[1][1, 8], args[1][2, 9], args[0][2, 9] = float("nan"), float("inf"), -3e38, -3e38
    with cpu.use_isa(isa):
        got = run("cpu", *args)
    for a, b in zip(got, run("reference", *args), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if dtype == torch.bfloat16:  # a sum beside a rounding step may go either way, a unit in the last place apart
            torch.testing.assert_close(a, b, rtol=2.0**-7, atol=2.0**-7, equal_nan=True)
            assert (whole(a) == whole(b)).float().mean() > 0.99 or not d
        else:
            torch.testing.assert_close(a, b, rtol=3e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 33, 200, 6144])
def test_same_bits_from_every_instruction_set_batch_and_thread_count(d: int, dtype: torch.dtype) -> None:
    t = 40
    h, delta = randn(t, d, dtype=dtype), randn(t, d, seed=1, dtype=dtype)
    h[2, 0], delta[3, d // 2] = float("nan"), float("inf")
    post, pre = weights(d, torch.bfloat16, torch.float32)
    with cpu.use_isa("portable"):
        expected = [whole(x) for x in run("cpu", h, delta, post, pre)]
    before = torch.get_num_threads()
    try:
        for isa in ISAS:
            with cpu.use_isa(isa):
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    assert all(map(torch.equal, map(whole, run("cpu", h, delta, post, pre)), expected))
                for part in (slice(0, 1), slice(17, 40)):
                    alone = run("cpu", h[part], delta[part], post, pre)
                    assert all(torch.equal(whole(a), b[part]) for a, b in zip(alone, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_the_native_op_checks_what_memory_safety_needs() -> None:
    from grok_kernels import _C

    h, w = randn(3, 8), randn(8)
    op = _C.sandwich_norm
    with pytest.raises(ValueError, match=r"delta has shape \[2, 8\], expected \[3, 8\] as h"):
        op(h, h[:2], w, w, EPS)
    with pytest.raises(ValueError, match="delta has dtype BFloat16, expected Float as h"):
        op(h, h.bfloat16(), w, w, EPS)
    with pytest.raises(ValueError, match=r"post_weight has shape \[5\].*D=8 from h"):
        op(h, h, w[:5], w, EPS)
    with pytest.raises(ValueError, match=r"pre_weight has shape \[7\].*D=8 from h"):
        op(h, h, None, w[:7], EPS)
    with pytest.raises(ValueError, match=r"delta has strides \[1, 3\]"):
        op(h, randn(8, 3).t(), w, w, EPS)
