"""Products and the expert layer of the native CPU backend, on every instruction set: against the reference, and what
only kernels can get wrong: borders of tiles and blocks, every code of a weight, alignment, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight, layouts
from tests.kernels.cases import ints, randint8, randn

STATUS = grok_kernels.backends()["grouped_gemm"]["cpu"]
pytestmark = [pytest.mark.skipif(not STATUS.available, reason=STATUS.reason), pytest.mark.usefixtures("isa")]
FP8, BF16, INT8, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.int8, torch.float32
WEIGHTS = [(INT8, 1), (INT8, 4), (FP8, 1), (FP8, 4), (BF16, 1), (FP32, 1)]


def matrices(e: int, n: int, k: int, dtype: torch.dtype, groups: int, seed: int = 1) -> tuple[Tensor, Tensor | None]:
    if dtype in (INT8, FP8):
        weight = randint8(e, n, k, seed=seed) if dtype == INT8 else randn(e, n, k, seed=seed).to(FP8)
        return weight, 1e-3 + 0.02 * randn(e, groups, n, seed=seed + 1).abs()
    return randn(e, n, k, seed=seed).to(dtype), None


def rows(m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    x = randn(m, k, seed=3)
    if dtype == INT8:
        return grok_kernels.quantize_int8(x)
    return (x.to(dtype), None) if dtype != FP8 else grok_kernels.quantize_fp8(x)


def forms(weight: Tensor) -> list[Tensor]:
    packs = grok_kernels.can_pack(weight.shape[1], weight.shape[2], weight.dtype)
    return [weight, layouts.pack(weight)] if packs else [weight]


def held(values: Tensor, scales: Tensor | None) -> Weight:
    return Weight.of(values, scales, "panels" if values.dim() == 6 else "rows")


def product(x: Tensor, values: Tensor, scales: Tensor | None, *args: Any, backend: str = "cpu") -> Tensor:
    with grok_kernels.use_backend(backend):
        return grok_kernels.grouped_gemm(x, held(values, scales), *args, out_dtype=FP32)


def assert_near(got: Tensor, expected: Tensor, bound: float = 2e-6) -> None:
    """Row by row, in the norm: both sides add K products in fp32, in different orders."""
    error = (got.double() - expected.double()).norm(dim=-1)
    assert (error <= bound * expected.double().norm(dim=-1)).all(), (error / expected.double().norm(dim=-1)).max()


@pytest.mark.parametrize("x_dtype", [BF16, FP32, INT8, FP8], ids=str)
@pytest.mark.parametrize(("dtype", "groups"), WEIGHTS, ids=str)
@pytest.mark.parametrize(("e", "n", "k"), [(2, 64, 128), (3, 70, 36), (2, 128, 1032), (1, 192, 516)])
def test_products(e: int, n: int, k: int, dtype: torch.dtype, groups: int, x_dtype: torch.dtype) -> None:
    weight, scale = matrices(e, n, k, dtype, groups)
    x, x_scale = rows(23, k, x_dtype)
    offsets = ints(*{1: (0, 23), 2: (0, 0, 23), 3: (0, 5, 6, 23)}[e])
    expected = product(x, weight, scale, offsets, x_scale, backend="reference")
    plain, *packed = (product(x, form, scale, offsets, x_scale) for form in forms(weight))
    assert_near(plain, expected)
    assert all(torch.equal(other, plain) for other in packed)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rounding_errors_grow_with_blocks_and_not_with_columns(dtype: torch.dtype) -> None:
    """In fp32, one chain of additions over these columns is wrong by 1.5e-6."""
    x, weight = randn(4, 8192, seed=1), randn(1, 64, 8192, seed=2).to(dtype)
    assert_near(product(x, weight, None), x.double() @ weight[0].double().T, 5e-7)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 251, 252, 253, 259, 510])
@pytest.mark.parametrize("x_dtype", [BF16, INT8], ids=str)
def test_every_height_of_tiles_and_blocks(m: int, x_dtype: torch.dtype) -> None:
    weight, scale = matrices(1, 64, 648, INT8, 1)
    x, x_scale = rows(m, 648, x_dtype)
    packed = layouts.pack(weight)
    got = product(x, packed, scale, None, x_scale)
    assert_near(got, product(x, weight, scale, None, x_scale, backend="reference"))
    for row in (slice(0, 1), slice(m - 1, m)):  # alone, a row has the same bits
        assert torch.equal(product(x[row], packed, scale, None, None if x_scale is None else x_scale[row]), got[row])


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 127, 128, 129, 255, 257, 511, 512, 513, 1023, 1024, 1025, 2052])
@pytest.mark.parametrize("m", [1, 5, 9])
@pytest.mark.parametrize("dtype", [INT8, FP8, BF16, FP32], ids=str)
def test_every_border_of_columns(k: int, m: int, dtype: torch.dtype) -> None:
    weight, scale = matrices(1, 64, k, dtype, 1)
    for x_dtype in (BF16, FP32, INT8):
        x, x_scale = rows(m, k, x_dtype)
        expected = product(x, weight, scale, None, x_scale, backend="reference")
        for form in forms(weight):
            assert_near(product(x, form, scale, None, x_scale), expected)


@pytest.mark.parametrize("n", [1, 15, 63, 64, 65, 127, 129])
def test_every_border_of_outputs(n: int) -> None:
    weight, scale = matrices(2, n, 20, INT8, 2)
    x, offsets = randn(7, 20, dtype=BF16), ints(0, 3, 7)
    got = product(x, weight, scale, offsets)
    assert_near(got, product(x, weight, scale, offsets, backend="reference"))


@pytest.mark.parametrize("dtype", [INT8, FP8, BF16], ids=str)
@pytest.mark.parametrize("x_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("m", [1, 5, 8])
def test_every_code_of_a_weight_is_exact(dtype: torch.dtype, x_dtype: torch.dtype, m: int) -> None:
    """Rows with a single 1 read the weights back."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    weight = codes.view(torch.int8).view(1, 64, 4) if dtype != BF16 else randn(1, 64, 4, dtype=BF16)
    weight = weight if dtype == BF16 else weight.view(dtype)
    scale = None if dtype == BF16 else torch.full((1, 1, 64), 0.5)
    for column in range(4):
        x = torch.zeros(m, 4, dtype=x_dtype)
        x[:, column] = 1
        for form in forms(weight):
            values = weight.float().nan_to_num()[0, :, column] * (1.0 if scale is None else 0.5)
            got = product(x, form, scale)
            special = weight.float().isnan()[0].any(1)  # 0 · NaN is NaN
            assert torch.equal(got[:, ~special], values[~special].expand(m, -1))
            assert got[:, special].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [1, 5, 14])
def test_what_is_not_finite_stays_in_its_row(bad: float, m: int) -> None:
    weight, scale = matrices(1, 64, 64, INT8, 1)
    weight[0, 5] = 0
    x = randn(m, 64, dtype=BF16)
    clean = product(x, weight, scale)
    x[m // 2, 10] = bad
    for form in forms(weight):
        got = product(x, form, scale)
        others = torch.arange(m) != m // 2
        assert torch.equal(got[others], clean[others])
        expected = product(x, weight, scale, backend="reference")
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got[got.isinf()], expected[expected.isinf()])


def test_extreme_scales() -> None:
    weight, _ = matrices(1, 64, 64, INT8, 1)
    x = randn(3, 64, dtype=BF16)
    for size in (1e-30, 1e30):
        scale = torch.full((1, 1, 64), size)
        assert_near(product(x, weight, scale), product(x, weight, scale, backend="reference"))


@pytest.mark.parametrize("dtype", [INT8, FP8, BF16, FP32], ids=str)
def test_strided_and_unaligned_arguments(dtype: torch.dtype) -> None:
    weight, scale = matrices(2, 64, 64, dtype, 1)
    x, offsets = randn(6, 64, dtype=BF16), ints(0, 2, 6)
    expected = product(x, weight, scale, offsets)
    raw = torch.zeros(2 * 64 * 64 + 1, dtype=dtype)
    raw.view(torch.uint8)[dtype.itemsize :] = weight.reshape(-1).view(torch.uint8)
    unaligned = raw[1:].view(2, 64, 64)
    wide_x, wide_w = torch.zeros(6, 67, dtype=BF16), torch.zeros(2, 64, 67, dtype=dtype)
    wide_x[:, 3:], wide_w.view(torch.uint8)[:, :, 3 * dtype.itemsize :] = x, weight.view(torch.uint8)
    wide_scale = None
    if scale is not None:
        wide_scale = torch.zeros(2, 1, 65)[:, :, 1:]
        wide_scale.copy_(scale)
    assert torch.equal(product(x, unaligned, scale, offsets), expected)
    assert torch.equal(product(wide_x[:, 3:], wide_w[:, :, 3:], wide_scale, offsets), expected)
    if dtype != FP32:
        packed = layouts.pack(weight)
        raw.view(torch.uint8)[dtype.itemsize :] = packed.reshape(-1).view(torch.uint8)
        assert torch.equal(product(x, raw[1:].view(packed.shape), scale, offsets), expected)


def layer(t: int, d: int, f: int, e: int, dtype: torch.dtype, weight_dtype: torch.dtype, groups: int) -> list[Any]:
    w13, s13 = matrices(e, 2 * f, d, weight_dtype, groups, 5)
    w2, s2 = matrices(e, d, f, weight_dtype, groups, 7)
    experts = torch.randint(0, e, (t, 2), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    return [randn(t, d, dtype=dtype), randn(t, 2, seed=9).abs(), experts, w13, s13, w2, s2]


def packed(args: list[Any]) -> list[Any]:
    return [layouts.pack(a) if i in (3, 5) else a for i, a in enumerate(args)]


def moe(args: list[Any], *more: str, backend: str = "cpu") -> Tensor:
    with grok_kernels.use_backend(backend):
        return grok_kernels.moe(*args[:3], held(*args[3:5]), held(*args[5:7]), *more)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("act_format", ["none", "fp8", "int8"])
@pytest.mark.parametrize(("weight_dtype", "groups"), WEIGHTS, ids=str)
@pytest.mark.parametrize(("d", "f"), [(128, 192), (36, 20)])
def test_moe(d: int, f: int, weight_dtype: torch.dtype, groups: int, act_format: str, dtype: torch.dtype) -> None:
    args = layer(19, d, f, 4, dtype, weight_dtype, groups)
    for activation in ("gelu_tanh", "gelu", "silu"):
        expected = moe(args, activation, act_format, backend="reference")
        got = moe(args, activation, act_format)
        if dtype == FP32 and act_format == "none":
            assert_near(got, expected, 3e-6)
        else:  # a sum next to a rounding step of act * up may go either way, in a row now and then
            error = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
            assert error.median() <= (3e-6 if dtype == FP32 else 5e-4)
            assert error.max() <= (0.03 if act_format == "fp8" else 0.01)
        if grok_kernels.can_pack(d, f, weight_dtype) and f % 64 == 0:
            assert torch.equal(moe(packed(args), activation, act_format), got)


@pytest.mark.parametrize("act_format", ["none", "int8"])
@pytest.mark.parametrize("weight_dtype", [INT8, FP8], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_a_row_s_bits_are_its_own(
    dtype: torch.dtype, weight_dtype: torch.dtype, act_format: str, threads: None
) -> None:
    """Alone, among others, in another order, on any number of threads, past the end of a block of tokens."""
    t = 1030
    args = packed(layer(t, 64, 64, 8, dtype, weight_dtype, 1))
    whole = moe(args, "gelu_tanh", act_format)
    order = torch.randperm(t, generator=torch.Generator().manual_seed(5))
    assert torch.equal(moe([*(a[order] for a in args[:3]), *args[3:]], "gelu_tanh", act_format), whole[order])
    for part in (slice(0, 1), slice(7, 12), slice(1020, 1030), slice(100, 300)):
        assert torch.equal(moe([*(a[part] for a in args[:3]), *args[3:]], "gelu_tanh", act_format), whole[part])
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(moe(args, "gelu_tanh", act_format), whole)


def test_experts_without_rows_are_not_read() -> None:
    args = layer(5, 64, 64, 4, BF16, BF16, 1)
    args[2] = ints(*[[1, 3]] * 5)
    expected = moe(args)
    args[3][[0, 2]], args[5][[0, 2]] = float("nan"), float("nan")
    for same in (args, packed(args)):
        assert torch.equal(moe(same), expected)


@pytest.mark.parametrize("t", [0, 1])
def test_few_or_no_tokens(t: int) -> None:
    args = layer(t, 64, 64, 4, BF16, INT8, 1)
    assert moe(args).shape == (t, 64)
    x, offsets = randn(t, 64, dtype=BF16), ints(0, 0, 0, t, t)
    assert product(x, args[3], args[4], offsets).shape == (t, 128)


def test_refuses_values_that_would_leave_memory() -> None:
    weight, scale = matrices(2, 64, 64, INT8, 1)
    x = randn(4, 64, dtype=BF16)
    for offsets in (ints(0, 5, 4), ints(0, 2, 3), ints(1, 2, 4), ints(0, -1, 4), ints(0, 2, 99)):
        with pytest.raises(ValueError, match=rf"offsets is \[{', '.join(map(str, offsets.tolist()))}\]"):
            product(x, weight, scale, offsets)
    args = layer(3, 64, 64, 4, BF16, INT8, 1)
    for bad in (-1, 4, 2**31 - 1):
        args[2][1, 1] = bad
        with pytest.raises(ValueError, match=rf"experts holds {bad}, expected 0\.\.3"):
            moe(args)


def test_a_packed_gate_and_up_that_share_a_panel_are_left_to_the_reference() -> None:
    args = layer(3, 64, 96, 2, BF16, INT8, 1)
    expected, args[3] = moe(args), layouts.pack(args[3])
    with pytest.raises(NotImplementedError, match="w13 is packed with F=96"):
        moe(args)
    assert_near(moe(args, backend="reference"), expected, 1e-2)
