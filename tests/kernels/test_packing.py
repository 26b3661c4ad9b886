"""The packed form of weights: the same values, taken by the products like the plain form."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import packing, registry
from grok_kernels.packing import plain_shape
from tests.kernels.cases import randint8, randn

FP8 = torch.float8_e4m3fn
DTYPES = (torch.int8, FP8, torch.bfloat16)
STATUS = grok_kernels.backends()["rms_norm"]["cpu"]


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


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "neither", "unaligned"])
def test_packs_ranges_of_rows(layout: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part, of any strides and alignment, by the extension and without it."""
    if not native:
        monkeypatch.setattr(packing, "_native", None)
    e, n, k = 2, 192, 4 * 67
    whole = weight(e, n, k, dtype)
    packed = grok_kernels.pack_weight(torch.zeros_like(whole))
    raw(packed).fill_(77)
    for first, last in ((64, 192), (0, 64)):
        part = whole[:, first:last]
        if layout == "columns":
            part = part.transpose(1, 2).contiguous().transpose(1, 2)
        elif layout == "neither":
            wide = torch.zeros(e, last - first, 2 * k, dtype=torch.uint8 if dtype == FP8 else dtype)
            wide[..., ::2] = part.view(wide.dtype)
            part = wide.view(dtype)[..., ::2]
        elif layout == "unaligned":
            memory = torch.zeros(raw(part).numel() + 1, dtype=torch.uint8)
            array = memory[1:].numpy()
            array[:] = raw(part.contiguous()).flatten().numpy()
            if dtype.itemsize == 1:
                part = memory[1:].view(dtype).view(part.shape)
            else:
                part = torch.from_numpy(array.view(np.int16)).view(dtype).view(part.shape)
            assert part.data_ptr() % 2
        grok_kernels.pack_into(part, packed, first)
    assert torch.equal(raw(grok_kernels.unpack_weight(packed)), raw(whole))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("transposed", [True, False])
def test_packs_in_parallel(transposed: bool, threads: int) -> None:
    stored = weight(2, 2112, 516, torch.int8)
    plain = stored if not transposed else stored.transpose(1, 2).contiguous().transpose(1, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(grok_kernels.unpack_weight(grok_kernels.pack_weight(plain)), stored)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "dtype", "row", "error"),
    [
        ((1, 64, 8), torch.bfloat16, 0, "of int8"),
        ((1, 64, 12), torch.int8, 0, r"expected \(1, N, 8\)"),
        ((2, 64, 8), torch.int8, 0, r"expected \(1, N, 8\)"),
        ((1, 60, 8), torch.int8, 0, "multiple of 64"),
        ((1, 64, 8), torch.int8, 32, "row=32, expected a multiple of 64 in 0..64"),
        ((1, 64, 8), torch.int8, 128, "row=128"),
        ((1, 64, 8), torch.int8, -64, "row=-64"),
    ],
)
def test_refuses_what_does_not_fit(shape: tuple[int, ...], dtype: torch.dtype, row: int, error: str) -> None:
    packed = grok_kernels.pack_weight(randint8(1, 128, 8))
    with pytest.raises(ValueError, match=error):
        grok_kernels.pack_into(torch.zeros(shape, dtype=dtype), packed, row)


@pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
def test_the_native_functions_check_what_memory_safety_needs() -> None:
    from grok_kernels import _C as native

    packed = grok_kernels.pack_weight(randint8(1, 128, 8))
    for args in (
        (randint8(1, 64, 12), packed, 0),
        (randint8(1, 64, 8), packed, 128),
        (randint8(1, 64, 8), packed, -64),
        (randint8(1, 64, 8), packed, 32),
        (randint8(1, 60, 8), packed, 0),
        (randint8(2, 64, 8), packed, 0),
        (randint8(1, 64, 8), packed.transpose(1, 2), 0),
        (randint8(1, 64, 8), packed[0], 0),
        (randn(1, 64, 8), packed, 0),
    ):
        with pytest.raises(ValueError, match="pack_into"):
            native.pack_into(*args)
    for rows in (torch.tensor([128]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])):
        index = rows if rows.is_floating_point() else rows.int()
        with pytest.raises(ValueError, match="packed_rows"):
            native.packed_rows(packed, index)
    with pytest.raises(ValueError, match="packed_rows"):
        native.packed_rows(grok_kernels.pack_weight(randint8(2, 64, 8)), torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_come_back(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(packing, "_native", None)
    plain = weight(1, 192, 20, dtype)
    rows = torch.tensor([0, 191, 64, 63, 17, 17], dtype=torch.int32)
    found = grok_kernels.packed_rows(grok_kernels.pack_weight(plain), rows)
    assert torch.equal(raw(found), raw(plain[0])[rows])
    assert grok_kernels.packed_rows(grok_kernels.pack_weight(plain), rows[:0]).shape == (0, 20)


def test_what_wants_the_packed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENV, raising=False)
    native = all(grok_kernels.backends()[op]["cpu"].available for op in ("grouped_gemm", "moe"))
    for dtype in DTYPES:
        assert grok_kernels.wants_packed(64, 8, dtype, "cpu") == native
        assert not grok_kernels.wants_packed(64, 8, dtype, "meta")
        assert not grok_kernels.wants_packed(63, 8, dtype, "cpu")
        with grok_kernels.use_backend("reference"):
            assert not grok_kernels.wants_packed(64, 8, dtype, "cpu")
    assert not grok_kernels.wants_packed(64, 8, torch.float32, "cpu")
    monkeypatch.setattr(registry, "_missing", {"cpu": "not built"})
    assert not grok_kernels.wants_packed(64, 8, torch.int8, "cpu")


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
