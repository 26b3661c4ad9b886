"""The packed form of weights: the same values, taken by the products like the plain form."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels.packing import plain_shape
from tests.kernels.cases import randint8, randn

FP8 = torch.float8_e4m3fn
DTYPES = (torch.int8, FP8, torch.bfloat16)


def weight(e: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return randint8(e, n, k) if dtype == torch.int8 else randn(e, n, k).to(dtype)


def raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("e", "n", "k"), [(1, 64, 4), (3, 128, 12), (2, 192, 256)])
def test_packs_and_unpacks_every_bit(e: int, n: int, k: int, dtype: torch.dtype) -> None:
    plain = weight(e, n, k, dtype)
    packed = grok_kernels.pack_weight(plain)
    assert packed.is_contiguous()
    assert (packed.dtype, plain_shape(packed)) == (dtype, (e, n, k))
    assert torch.equal(raw(grok_kernels.unpack_weight(packed)), raw(plain))
    run = 4 // dtype.itemsize
    value = packed.float()[e - 1, n // 64 - 1, k // run - 1, 2, 5, run - 1]
    assert value == plain.float()[e - 1, n - 64 + 2 * 16 + 5, k - 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_a_transposed_view(dtype: torch.dtype) -> None:
    stored = weight(2, 8, 64, dtype)  # (E, K, N)
    expected = grok_kernels.pack_weight(stored.transpose(1, 2).contiguous())
    assert torch.equal(raw(grok_kernels.pack_weight(stored.transpose(1, 2))), raw(expected))


def test_a_plain_weight_unpacks_to_itself() -> None:
    plain = randn(1, 3, 5)
    assert grok_kernels.unpack_weight(plain) is plain


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 60, 4), torch.int8), ((1, 64, 6), torch.int8), ((64, 4), torch.int8), ((1, 64, 4), torch.float32)],
)
def test_refuses_what_has_no_packed_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape {shape}")):
        grok_kernels.pack_weight(torch.zeros(shape, dtype=dtype))


def scaled(dtype: torch.dtype, e: int, groups: int, n: int) -> Tensor | None:
    return None if dtype == torch.bfloat16 else randn(e, groups, n, seed=3).abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_take_either_form(dtype: torch.dtype) -> None:
    w13, w2 = weight(2, 128, 64, dtype), weight(2, 64, 64, dtype)
    groups = 4 if dtype == torch.int8 else 1
    s13, s2 = scaled(dtype, 2, groups, 128), scaled(dtype, 2, groups, 64)
    x, offsets = randn(5, 64, dtype=torch.bfloat16), torch.tensor([0, 2, 5], dtype=torch.int32)
    pack = grok_kernels.pack_weight
    assert torch.equal(
        grok_kernels.grouped_gemm(x, pack(w13), s13, offsets), grok_kernels.grouped_gemm(x, w13, s13, offsets)
    )
    weights, experts = grok_kernels.route_topk(x, randn(2, 64), 2)
    args: list[Any] = [x, weights, experts]
    assert torch.equal(grok_kernels.moe(*args, pack(w13), s13, pack(w2), s2), grok_kernels.moe(*args, w13, s13, w2, s2))


def test_refuses_a_packed_weight_of_another_shape() -> None:
    x, packed = randn(2, 8), grok_kernels.pack_weight(randint8(1, 64, 12))
    with pytest.raises(ValueError, match=r"weight has shape \(1, 64, 12\), expected \(E, N, K\) with K=8"):
        grok_kernels.grouped_gemm(x, packed, torch.ones(1, 1, 64))
    with pytest.raises(ValueError, match=r"neither \(E N K\) nor what pack_weight returns"):
        grok_kernels.grouped_gemm(x, packed.transpose(3, 4), torch.ones(1, 1, 64))
