"""The corrections to Triton's interpreter: every cast that kernels use, and dots, against ml_dtypes and exact sums."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.backends import BACKENDS
from tests.kernels.cases import FP8, randint8, randn

if "triton" not in BACKENDS:
    pytest.skip("Triton's kernels are not interpreted here", allow_module_level=True)

import triton
import triton.language as tl

from grok_kernels.triton import interpreter

interpreter.correct()


@triton.jit
def _copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(a_ptr + row * N + column), tl.load(b_ptr + row * N + column))
    tl.store(c_ptr + row * N + column, c)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _copy[(1,)](x, y, BLOCK=x.numel())
    return y


def _edges(dtype: torch.dtype) -> Tensor:
    """Every bf16, as this type: all exponents, halves between neighbours of e4m3, infinities, NaN."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(dtype)


def test_fp32_rounds_to_nearest_even_in_bf16() -> None:
    bits = _edges(torch.float32).view(torch.int32)
    x = torch.cat([bits, bits + 0x7FFF, bits + 0x8000, bits + 0x8001]).view(torch.float32)
    got, expected = _cast(x, torch.bfloat16), x.to(torch.bfloat16)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(0.0), expected.nan_to_num(0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_e4m3_rounds_to_nearest_even_and_saturates(dtype: torch.dtype) -> None:
    x = _edges(dtype)
    got, expected = _cast(x, FP8), x.float().clamp(-448, 448).to(FP8)
    assert torch.equal(got.float().isnan(), expected.float().isnan())
    kept = ~expected.float().isnan()
    assert torch.equal(got.view(torch.uint8)[kept], expected.view(torch.uint8)[kept])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_8_bit_value_widens_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for x in (codes.view(FP8), codes.view(torch.int8)):
        torch.testing.assert_close(_cast(x, dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.int8], ids=str)
def test_a_dot_is_exact_up_to_one_rounding(dtype: torch.dtype) -> None:
    a, b = (randint8(32, 32, seed=s) if dtype == torch.int8 else randn(32, 32, seed=s).to(dtype) for s in (0, 1))
    c = torch.empty(32, 32, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    _product[(1,)](a, b, c, N=32)
    assert torch.equal(c, (a.double() @ b.double()).to(c.dtype))
