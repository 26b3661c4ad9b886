"""quantize_fp8 and quantize_int8 of the native CPU backend: the reference's bits, from every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import cpu
from tests.kernels.backends import ISAS
from tests.kernels.cases import randn

STATUS = grok_kernels.backends()["quantize_fp8"]["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
NAN, INF = float("nan"), float("inf")
FORMS = {"fp8": grok_kernels.quantize_fp8, "int8": grok_kernels.quantize_int8}


def run(backend: str, form: str, x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    with grok_kernels.use_backend(backend):
        q, scale = FORMS[form](x, group_size)
    return q, scale


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0].view(torch.uint8) & 0x7F, expected[0].view(torch.uint8) & 0x7F)
    signed = ~expected[0].float().isnan()  # the sign of a NaN is whatever the division made of it
    assert torch.equal(got[0].view(torch.uint8)[signed], expected[0].view(torch.uint8)[signed])
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


def every_size(t: int, d: int, dtype: torch.dtype) -> Tensor:
    """Random bits, so numbers of every exponent; in some rows of one size, in the last two with NaN and infinities."""
    bits = torch.randint(-(2**31), 2**31, (t, d), generator=torch.Generator().manual_seed(d)).int()
    x = torch.where(bits.view(torch.float32).isfinite(), bits.view(torch.float32), 1.0)
    x[::3] = randn(len(x[::3]), d, seed=d) * torch.logspace(-44, 37, len(x[::3]))[:, None]
    x[-1, d // 2], x[-2, d // 3] = NAN, -INF
    return x.to(dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("d", [1, 15, 64, 127, 128, 129, 300, 1536])
def test_the_reference_s_bits(d: int, form: str, group_size: int, dtype: torch.dtype, isa: str) -> None:
    x = every_size(40, d, dtype)
    with cpu.use_isa(isa):
        assert_same(run("cpu", form, x, group_size), run("reference", form, x, group_size))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMS)
def test_every_bf16_beside_every_scale_of_a_binade(form: str, isa: str) -> None:
    """All numbers of bf16 up to the row's largest: every way of rounding, with halves among them."""
    values = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    rows = []
    for largest in torch.arange(128, 256, 9) / 128:
        rows.append(
            torch.where(values.float() <= largest, values, 0.0).float() * torch.where(values.float() > 0.1, 1, -1)
        )
        rows[-1][0] = largest
    x = torch.stack(rows)
    with cpu.use_isa(isa):
        assert_same(run("cpu", form, x, 0), run("reference", form, x, 0))


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_wider_tensor_threads_and_batch(form: str) -> None:
    wide = torch.full((90, 900), NAN, dtype=torch.bfloat16)
    wide[:, 3:850] = randn(90, 847, dtype=torch.bfloat16)
    x = wide[::2, 3:850]
    expected = run("reference", form, x, 128)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_same(run("cpu", form, x, 128), expected)
    finally:
        torch.set_num_threads(before)
    for part in (slice(0, 1), slice(11, 45)):
        q, scale = expected
        assert_same(run("cpu", form, x[part], 128), (q[part], scale[part]))


@pytest.mark.parametrize("form", FORMS)
def test_the_native_op_checks_what_memory_safety_needs(form: str) -> None:
    from grok_kernels import _C

    op = getattr(_C, f"quantize_{form}")
    with pytest.raises(ValueError, match=f"quantize_{form}: group_size=-1, expected 0 or more"):
        op(randn(3, 8), -1)
    with pytest.raises(ValueError, match="x has dtype Half"):
        op(randn(3, 8).half(), 0)
    with pytest.raises(ValueError, match=r"strides \[1, 8\]"):
        op(randn(3, 8).t(), 0)
