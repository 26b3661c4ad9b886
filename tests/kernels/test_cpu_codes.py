"""Weights of 4, 5 and 6 bits on the native CPU kernels, below the ops: packed as the layout's definition here says, and
multiplied as S · value − M, on every instruction set, in both layouts."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import cpu
from tests.kernels.cases import ints, randn

STATUS = grok_kernels.backends()["grouped_gemm"]["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
if STATUS.available:
    from grok_kernels import _C

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIGNED = {"int4": 4, "int5": 5, "int6_k": 6}
BITS = {"int4_zero": 4, "int4_min": 4, "int4_k": 4, "int5_min": 5, "int5_k": 5, **SIGNED}


class Codes(NamedTuple):
    """A weight as the native functions take it."""

    format: str
    layout: str
    shape: tuple[int, int, int]
    planes: tuple[Tensor, ...]


def zero_point(fmt: str) -> int:
    return 2 ** (BITS[fmt] - 1) if fmt in SIGNED else 0


def random_codes(fmt: str, shape: tuple[int, int, int], group: int, above: int = 0, seed: int = 1) -> Codes:
    """In rows. group: columns that share S and M; above: those that share scales where there are two levels."""
    generator = torch.Generator().manual_seed(seed)
    (e, n, k), bits, zero = shape, BITS[fmt], zero_point(fmt)

    def whole(groups: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, (e, groups, n), generator=generator, dtype=torch.int32).to(dtype)

    def real(groups: int, dtype: torch.dtype) -> Tensor:
        return (torch.randn(e, groups, n, generator=generator) * 0.02).to(dtype)

    q = torch.randint(-zero, 2**bits - zero, shape, generator=generator, dtype=torch.int32).to(torch.int8)
    first, groups = k // (above or group), k // group
    planes = [q, real(first, FP32 if fmt == "int4_zero" else FP16)]
    if fmt == "int6_k":
        planes.append(whole(groups, -128, 128, torch.int8))
    elif fmt.endswith("_k"):
        planes += [whole(groups, 0, 64, torch.uint8), real(first, FP16), whole(groups, 0, 64, torch.uint8)]
    elif fmt.endswith("_min"):
        planes.append(real(first, FP16))
    elif fmt.endswith("_zero"):
        planes.append(whole(first, 0, 17, torch.uint8))
    return Codes(fmt, "rows", shape, tuple(planes))


def scales_and_minima(w: Codes) -> tuple[Tensor, Tensor]:
    """S and M (E, N, K) fp32."""
    k = w.shape[2]

    def wide(plane: Tensor) -> Tensor:
        return plane.float().repeat_interleave(k // plane.shape[1], dim=1).transpose(1, 2)

    planes = [wide(p) for p in w.planes[1:]]
    if w.format.endswith("_zero"):
        return planes[0], planes[0] * planes[1]
    if w.format.endswith("_min"):
        return planes[0], -planes[1]
    if w.format == "int6_k":
        return planes[0] * planes[1], torch.zeros(())
    return (planes[0] * planes[1], planes[2] * planes[3]) if w.format.endswith("_k") else (planes[0], torch.zeros(()))


def dequantised(w: Codes) -> Tensor:
    """(E, N, K) fp32, rounded once."""
    s, m = scales_and_minima(w)
    return (s.double() * w.planes[0].double() - m.double()).float()


def panels_of(w: Codes) -> Codes:
    """The layout as it is defined: one bit operation a column."""
    (e, n, k), bits = w.shape, BITS[w.format]
    u = (w.planes[0].to(torch.int64) + zero_point(w.format)).view(e, n // 64, 64, k // 32, 32)
    words = torch.zeros(e, n // 64, k // 32, bits, 64, dtype=torch.int64)
    each = bits - 4
    for column in range(32):
        v, j, s = column // 8, column % 8 // 2, column % 2
        code = u[..., column].transpose(2, 3)
        words[..., v, :] |= (code & 15) << (4 * j + 16 * s)
        if each:
            per_run = 4 // each
            shift = 16 * s + 8 * (j >> 1) + each * ((j & 1) + 2 * (v % per_run))
            words[..., 4 + v // per_run, :] |= (code >> 4) << shift
    values = torch.stack([words >> 8 * i & 255 for i in range(4)], -1).to(torch.uint8)
    planes = [p.view(e, -1, n // 64, 64).transpose(1, 2).contiguous() for p in w.planes[1:]]
    return Codes(w.format, "panels", w.shape, (values, *planes))


def packed(w: Codes) -> Codes:
    e, n, k = w.shape
    values = torch.empty(e, n // 64, k // 32, BITS[w.format], 64, 4, dtype=torch.uint8)
    _C.pack_codes(w.planes[0], values, 0, zero_point(w.format))
    planes = [p.view(e, -1, n // 64, 64).transpose(1, 2).contiguous() for p in w.planes[1:]]
    return Codes(w.format, "panels", w.shape, (values, *planes))


def product(x: Tensor, w: Codes, offsets: Tensor | None = None, x_scale: Tensor | None = None) -> Tensor:
    return _C.grouped_gemm(x, w, offsets, x_scale, FP32)


def assert_near(got: Tensor, expected: Tensor, bound: float = 2e-6) -> None:
    error = (got.double() - expected.double()).norm(dim=-1)
    assert (error <= bound * expected.double().norm(dim=-1)).all(), (error / expected.double().norm(dim=-1)).max()


def group_of(fmt: str) -> tuple[int, int]:
    return (16, 256) if fmt == "int6_k" else (32, 256) if fmt.endswith("_k") else (32, 0)


@pytest.mark.parametrize("fmt", BITS)
def test_packing_is_the_layout(fmt: str) -> None:
    w = random_codes(fmt, (2, 128, 320), 32, 32)
    expected = panels_of(w).planes[0]
    assert torch.equal(packed(w).planes[0], expected)
    zero = zero_point(fmt)
    parts = torch.zeros_like(expected)
    columns_first = w.planes[0].transpose(1, 2).contiguous().transpose(1, 2)
    _C.pack_codes(columns_first[:, 64:], parts, 64, zero)
    _C.pack_codes(w.planes[0][:, :64], parts, 0, zero)
    assert torch.equal(parts, expected)


@pytest.mark.parametrize("fmt", BITS)
def test_weights_are_dequantised_exactly(fmt: str, isa: str) -> None:
    """Rows with a single 1 read the weights back, alone and in tiles."""
    w = random_codes(fmt, (1, 64, 64), *((16, 32) if fmt.endswith("_k") else (16,)))
    expected = dequantised(w)[0].T
    if fmt == "int4_zero" and isa == "portable":  # S · value has more bits than fp32 there
        w = w._replace(planes=(w.planes[0], w.planes[1].half().float(), w.planes[2]))
        expected = dequantised(w)[0].T
    eye = torch.eye(64)
    for same in (w, packed(w)):
        for m in (1, 6, 64):
            assert torch.equal(torch.cat([product(part, same) for part in eye.split(m)]), expected)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("fmt", BITS)
@pytest.mark.parametrize("k", [512, 1280])
def test_products(k: int, fmt: str, dtype: torch.dtype, isa: str) -> None:
    w = random_codes(fmt, (3, 64, k), *group_of(fmt))
    x, offsets = randn(20, k, seed=3, dtype=dtype), ints(0, 1, 1, 20)
    weights = dequantised(w).double()
    expected = torch.cat([x[:1].double() @ weights[0].T, x[1:].double() @ weights[2].T])
    got = product(x, w, offsets)
    assert_near(got, expected)
    assert torch.equal(product(x, packed(w), offsets), got)
    for m in range(1, 14):  # alone or in any company, a row has the same bits
        assert torch.equal(product(x[1 : 1 + m], packed(w), ints(0, 0, 0, m)), got[1 : 1 + m])


@pytest.mark.parametrize(
    ("fmt", "n", "k", "group", "above"),
    [
        ("int4", 70, 36, 12, 0), ("int4_zero", 1, 100, 100, 0), ("int5_min", 65, 33, 1, 0), ("int6_k", 7, 40, 5, 20),
        ("int4_k", 64, 96, 48, 96), ("int4", 64, 192, 64, 0), ("int4_zero", 64, 384, 384, 0), ("int5", 64, 288, 96, 0),
    ],
)  # fmt: skip
def test_odd_sizes(fmt: str, n: int, k: int, group: int, above: int, isa: str) -> None:
    w = random_codes(fmt, (2, n, k), group, above)
    x, offsets = randn(9, k, seed=3), ints(0, 2, 9)
    expected = torch.cat([x[:2].double() @ dequantised(w)[0].double().T, x[2:].double() @ dequantised(w)[1].double().T])
    got = product(x, w, offsets)
    assert_near(got, expected)
    if n % 64 == 0:
        assert torch.equal(product(x, packed(w), offsets), got)


def test_int8_takes_scales_of_16_bits(isa: str) -> None:
    values = torch.randint(-128, 128, (1, 128, 256), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    x = randn(7, 256, seed=2)
    for groups in (1, 8):
        scales = (0.01 * randn(1, groups, 128, seed=3)).half()
        half, full = (Codes("int8", "rows", (1, 128, 256), (values, s)) for s in (scales, scales.float()))
        assert torch.equal(product(x, half), product(x, full))


def refused(message: str, w: Any) -> None:
    with pytest.raises(ValueError, match=message):
        product(torch.ones(1, w.shape[2]), w)


def test_what_does_not_fit_is_refused() -> None:
    w = random_codes("int4_k", (1, 64, 512), 32, 256)
    whole, (values, scales, subscales, minima, subminima) = packed(w), w.planes
    refused("has 4 planes, expected 5 of format int4_k", w._replace(planes=w.planes[:4]))
    refused(
        r"expected those of pack_codes .* of 4 bits",
        whole._replace(planes=(whole.planes[0][:, :, 1:], *whole.planes[1:])),
    )
    refused("dtype Char", whole._replace(planes=(values, *whole.planes[1:])))
    refused(
        r"subscales of weight .* dtype Float, expected \(E, groups, N\) of Byte",
        w._replace(planes=(values, scales, subscales.float(), minima, subminima)),
    )
    refused(
        "2 groups of scales, 16 of subscales, 1 of minima",
        w._replace(planes=(values, scales, subscales, minima[:, :1], subminima)),
    )
    refused(r"expected \(E, N / 64, groups, 64\)", whole._replace(planes=(whole.planes[0], *w.planes[1:])))
    fine = packed(random_codes("int4", (1, 64, 64), 16))
    eight = torch.zeros(1, 1, 8, 64, dtype=FP16)
    refused("groups of 8 columns, expected a multiple of 16", fine._replace(planes=(fine.planes[0], eight)))
    with pytest.raises(ValueError, match="zero_point=3, expected 0 or 8"):
        _C.pack_codes(torch.zeros(1, 64, 64, dtype=torch.int8), fine.planes[0], 0, 3)


def quantised(m: int, k: int, per_row: bool) -> tuple[Tensor, Tensor]:
    """int8 rows, every value of which occurs (also −128, which no quantisation gives), and their scales."""
    x = torch.randint(-128, 128, (m, k), generator=torch.Generator().manual_seed(4)).to(torch.int8)
    x[0] = 127
    x[-1] = -128
    return x, 0.01 * randn(m, 1 if per_row else -(-k // 128), seed=5).abs()


def exact_product(x: Tensor, x_scale: Tensor, w: Codes) -> Tensor:
    """In double precision, from sums that are exact in it."""
    wide = x_scale.double().repeat_interleave(128, dim=1)[:, : w.shape[2]] if x_scale.shape[1] > 1 else x_scale.double()
    s, m = scales_and_minima(w)
    return (x.double() * wide) @ (s.double() * w.planes[0].double() - m.double())[0].T


def int8_weight(n: int, k: int, groups: int) -> Codes:
    values = torch.randint(-128, 128, (1, n, k), generator=torch.Generator().manual_seed(1)).to(torch.int8)
    values[:, 0], values[:, 1] = 127, -128
    return Codes("int8", "rows", (1, n, k), (values, 0.01 * randn(1, groups, n, seed=3).abs()))


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("fmt", "k", "group", "above"),
    [(fmt, k, *group_of(fmt)) for fmt in BITS for k in (512, 1280)]
    + [
        ("int4", 192, 16, 0), ("int4_zero", 160, 160, 0), ("int5_min", 96, 16, 0), ("int4_min", 1536, 768, 0),
        ("int4_k", 768, 16, 384), ("int6_k", 256, 32, 128), ("int5", 640, 64, 0), ("int4_k", 256, 64, 256),
    ],
)  # fmt: skip
def test_int8_rows(fmt: str, k: int, group: int, above: int, per_row: bool, isa: str) -> None:
    """Extreme values fill every integer sum; a row has its bits alone and in any company, in either layout."""
    w = random_codes(fmt, (1, 192, k), group, above)
    zero = zero_point(fmt)
    w.planes[0][:, 0], w.planes[0][:, 1] = 2 ** BITS[fmt] - 1 - zero, -zero
    x, x_scale = quantised(14, k, per_row)
    got = product(x, packed(w), None, x_scale)
    assert_near(got, exact_product(x, x_scale, w))
    assert torch.equal(product(x, w, None, x_scale), got)
    for m in range(1, 14):
        assert torch.equal(product(x[1 : 1 + m], packed(w), None, x_scale[1 : 1 + m]), got[1 : 1 + m])


@pytest.mark.parametrize(("n", "k", "group"), [(192, 768, 32), (70, 768, 16), (70, 1152, 64), (3, 160, 16)])
@pytest.mark.parametrize("fmt", ["int8", *BITS])
def test_int8_rows_have_the_same_bits_by_any_integers(fmt: str, n: int, k: int, group: int) -> None:
    """AVX2 adds products up in 16 bits, VNNI in 32. In rows, whose last panel has fewer than 64 outputs."""
    two = fmt.endswith("_k")
    if two and k % 384:
        pytest.skip("two levels come in 128 columns")
    w = int8_weight(n, k, k // group) if fmt == "int8" else random_codes(fmt, (1, n, k), group, 384 if two else 0)
    x, x_scale = quantised(14, k, per_row=False)
    results = []
    for name in cpu.isas():
        if name.startswith("avx"):
            with cpu.use_isa(name):
                results.append(product(x, w, None, x_scale))
    assert all(torch.equal(result, results[0]) for result in results)
    if results:
        assert_near(results[0], exact_product(x, x_scale, w))


@pytest.mark.parametrize("groups", [1, 2, 4, 8, 32, 64])
def test_int8_rows_by_int8_weights(groups: int, isa: str) -> None:
    w = int8_weight(128, 512, groups)
    values = torch.empty(1, 2, 128, 4, 16, 4, dtype=torch.int8)
    _C.pack_into(w.planes[0], values, 0)
    in_panels = w._replace(layout="panels", planes=(values, w.planes[1]))
    for per_row in (False, True):
        x, x_scale = quantised(14, 512, per_row)
        got = product(x, in_panels, None, x_scale)
        assert_near(got, exact_product(x, x_scale, w))
        assert torch.equal(product(x, w, None, x_scale), got)
        for m in range(1, 14):
            assert torch.equal(product(x[1 : 1 + m], in_panels, None, x_scale[1 : 1 + m]), got[1 : 1 + m])


@pytest.mark.parametrize("fmt", ["int8", *BITS])
def test_integer_sums_are_exact(fmt: str, isa: str) -> None:
    """Where every number of a product and their sum are whole and below 2^24, so is the result, to the last bit."""
    k = 512
    if fmt == "int8":
        w = int8_weight(64, k, 4)
    else:
        w = random_codes(fmt, (1, 64, k), 32, 256)
        for plane in w.planes[2:]:
            plane.copy_(torch.randint(0, 3, plane.shape, generator=torch.Generator().manual_seed(6)))
    w.planes[1].copy_(torch.randint(1, 3, w.planes[1].shape, generator=torch.Generator().manual_seed(7)))
    x = torch.randint(-127, 128, (9, k), generator=torch.Generator().manual_seed(8)).to(torch.int8)
    s, m = scales_and_minima(w)
    exact = x.long() @ (s.long() * w.planes[0].long() - m.long())[0].T
    assert exact.abs().max() < 2**24
    for each in (1, 9):
        parts = x.split(each)
        got = torch.cat([product(part, w, None, torch.ones(len(part), 4)) for part in parts])
        assert torch.equal(got.long(), exact)


def test_gate_and_up_may_share_a_panel_in_rows(isa: str) -> None:
    w13, w2 = random_codes("int4_min", (2, 2 * 32, 96), 32), random_codes("int4", (2, 96, 32), 32, seed=2)
    x, weights, experts = randn(5, 96), randn(5, 2, seed=9).abs(), ints(*[[1, 0]] * 5)
    got, expected = (
        _C.moe(x, weights, experts, *pair, "silu", "none", None, None)
        for pair in ((w13, w2), [Codes("fp32", "rows", w.shape, (dequantised(w).contiguous(),)) for w in (w13, w2)])
    )
    assert_near(got, expected)


@pytest.mark.parametrize("act_format", ["none", "int8"])
def test_expert_layers(act_format: str, isa: str, threads: None) -> None:
    """Of two formats; the same bits for a token whatever is beside it, on any number of threads."""
    t, d, f = 40, 256, 256
    w13 = random_codes("int4_k", (4, 2 * f, d), 32, 256)
    w2 = random_codes("int6_k", (4, d, f), 16, 256, seed=2)
    for w in (w13, w2):
        w.planes[1].mul_(0.002)
    x, weights = randn(t, d, dtype=BF16), randn(t, 2, seed=9).abs()
    experts = torch.randint(0, 4, (t, 2), generator=torch.Generator().manual_seed(2), dtype=torch.int32)

    def moe(rows: slice, *pair: Codes) -> Tensor:
        return _C.moe(x[rows], weights[rows], experts[rows], *pair, "gelu_tanh", act_format, None, None)

    dense = [Codes("fp32", "rows", w.shape, (dequantised(w).contiguous(),)) for w in (w13, w2)]
    got = moe(slice(None), packed(w13), packed(w2))
    error = (got.double() - moe(slice(None), *dense).double()).norm(dim=-1)
    assert (error <= 0.01 * got.double().norm(dim=-1)).all()
    assert torch.equal(moe(slice(None), w13, w2), got)
    for rows in (slice(0, 1), slice(7, 12), slice(3, 40)):
        assert torch.equal(moe(rows, packed(w13), packed(w2)), got[rows])
    torch.set_num_threads(1)
    assert torch.equal(moe(slice(None), packed(w13), packed(w2)), got)
