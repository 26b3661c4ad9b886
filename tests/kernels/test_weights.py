"""Weights: what `Weight.of` takes and refuses, and the layout in panels, which holds the same values as rows."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import grok_kernels
from grok_kernels import Weight, cpu, layouts, registry
from tests.kernels.cases import randint8, randn

FP8 = torch.float8_e4m3fn
DTYPES = (torch.int8, FP8, torch.bfloat16)
STATUS = grok_kernels.backends()["rms_norm"]["cpu"]


def values(e: int, n: int, k: int, dtype: torch.dtype) -> Tensor:
    return randint8(e, n, k) if dtype == torch.int8 else randn(e, n, k).to(dtype)


def raw(x: Tensor) -> Tensor:
    return x.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("e", "n", "k"), [(1, 64, 4), (3, 128, 12), (2, 192, 256)])
def test_packs_and_unpacks_every_bit(e: int, n: int, k: int, dtype: torch.dtype) -> None:
    plain = values(e, n, k, dtype)
    packed = layouts.pack(plain)
    assert packed.is_contiguous()
    assert (packed.dtype, layouts.logical_shape(packed)) == (dtype, (e, n, k))
    assert torch.equal(raw(layouts.unpack(packed)), raw(plain))
    run = 4 // dtype.itemsize
    value = packed.float()[e - 1, n // 64 - 1, k // run - 1, 2, 5, run - 1]
    assert value == plain.float()[e - 1, n - 64 + 2 * 16 + 5, k - 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_a_transposed_view(dtype: torch.dtype) -> None:
    stored = values(2, 8, 64, dtype)  # (E, K, N)
    expected = layouts.pack(stored.transpose(1, 2).contiguous())
    assert torch.equal(raw(layouts.pack(stored.transpose(1, 2))), raw(expected))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "neither", "unaligned"])
def test_packs_ranges_of_rows(layout: str, dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part, of any strides and alignment, by the extension and without it."""
    if not native:
        monkeypatch.setattr(layouts, "native", None)
    e, n, k = 2, 192, 4 * 67
    whole = values(e, n, k, dtype)
    packed = layouts.pack(torch.zeros_like(whole))
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
    assert torch.equal(raw(layouts.unpack(packed)), raw(whole))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("transposed", [True, False])
def test_packs_in_parallel(transposed: bool, threads: int) -> None:
    stored = values(2, 2112, 516, torch.int8)
    plain = stored if not transposed else stored.transpose(1, 2).contiguous().transpose(1, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(layouts.unpack(layouts.pack(plain)), stored)
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
    packed = layouts.pack(randint8(1, 128, 8))
    with pytest.raises(ValueError, match=error):
        grok_kernels.pack_into(torch.zeros(shape, dtype=dtype), packed, row)


@pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
def test_the_native_functions_check_what_memory_safety_needs() -> None:
    native = cpu._module
    packed = layouts.pack(randint8(1, 128, 8))
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
    weight = Weight.of(packed, torch.ones(1, 1, 128), "panels")
    for rows in (torch.tensor([128]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor([[0]])):
        index = rows if rows.is_floating_point() else rows.int()
        with pytest.raises(ValueError, match="weight_rows: row"):
            native.weight_rows(weight, index, 1.0, torch.float32)
    two = Weight.of(randn(2, 64, 8))
    with pytest.raises(ValueError, match="weight_rows: weight has 2 matrices, expected 1"):
        native.weight_rows(two, torch.zeros(1, dtype=torch.int32), 1.0, torch.float32)
    with pytest.raises(ValueError, match="weight_rows: out_dtype has dtype Half"):
        native.weight_rows(weight, torch.zeros(1, dtype=torch.int32), 1.0, torch.float16)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_rows_are_looked_up(
    dtype: torch.dtype, layout: grok_kernels.Layout, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multiplied in fp32, and rounded once; by default in the type of what has no scales."""
    if not native:
        monkeypatch.setattr(layouts, "native", None)
    if (dtype, layout) == (torch.float32, "panels"):
        pytest.skip("fp32 lies in rows only")
    plain, scales = randn(1, 192, 20) if dtype == torch.float32 else values(1, 192, 20, dtype), randn(1, 5, 192)
    weight = Weight.of(plain, scales if dtype.itemsize == 1 else None).with_layout(layout)
    exact = plain[0].float()
    if dtype.itemsize == 1:
        exact = exact * scales[0].T.repeat_interleave(4, 1)
    rows = torch.tensor([0, 191, 64, 63, 17, 17], dtype=torch.int32)
    found = grok_kernels.weight_rows(weight, rows)
    assert found.dtype == (torch.float32 if dtype.itemsize == 1 else dtype)
    assert torch.equal(found.float(), exact[rows])
    for out in (torch.float32, torch.bfloat16):
        assert torch.equal(grok_kernels.weight_rows(weight, rows, 1.7, out), (exact[rows] * 1.7).to(out))
    assert grok_kernels.weight_rows(weight, rows[:0]).shape == (0, 20)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("format", "layout"), [("int8", "rows"), ("int8", "panels"), ("int4", "panels")])
def test_what_a_lookup_refuses(
    format: str, layout: grok_kernels.Layout, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative row is none of those at the end."""
    if not native:
        monkeypatch.setattr(layouts, "native", None)
    weight = Weight.of(torch.zeros(1, 64, 32, dtype=torch.int8), torch.ones(1, 2, 64), format=format)
    weight = weight.with_layout(layout)
    for dtype in (torch.float32, torch.float16):  # which the extension does not give
        for row in (-1, -64, 64):
            with pytest.raises((ValueError, IndexError)):
                grok_kernels.weight_rows(weight, torch.tensor([row], dtype=torch.int32), 1.0, dtype)
        for rows in (torch.tensor([0]), torch.tensor([0.0]), torch.zeros(1, 1, dtype=torch.int32)):
            with pytest.raises(ValueError, match="weight_rows: rows has"):
                grok_kernels.weight_rows(weight, rows, 1.0, dtype)
    none, two = torch.zeros(0, dtype=torch.int32), Weight.of(randn(2, 64, 8))
    with pytest.raises(ValueError, match="weight_rows: weight has 2 matrices, expected 1"):
        grok_kernels.weight_rows(two, none)
    with pytest.raises(ValueError, match="weight_rows: dtype=int32, expected a floating-point type"):
        grok_kernels.weight_rows(weight, none, 1.0, torch.int32)


@pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
def test_a_weight_first_used_under_a_mode_is_as_any_other() -> None:
    """It is keyed for good at its first use; the extension reads its rows in a recording too, and no fake ones."""
    weight, rows = Weight.of(randint8(1, 64, 8), torch.ones(1, 1, 64)), torch.tensor([5, 6], dtype=torch.int32)
    replay = cpu.record(lambda: grok_kernels.weight_rows(weight, rows))
    assert weight.signature is not None
    assert list(replay.seconds()) == ["weight_rows"]
    rows[0] = 64
    with pytest.raises(ValueError, match=r"weight_rows: row 64 is not in 0\.\.63"):
        replay()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert grok_kernels.weight_rows(weight, torch.zeros(3, dtype=torch.int32)).shape == (3, 8)


def test_what_wants_the_packed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENV, raising=False)
    native = all(grok_kernels.backends()[op]["cpu"].available for op in ("grouped_gemm", "moe"))
    for format in ("int8", "fp8_e4m3", "bf16"):
        spec = grok_kernels.Spec(format)
        assert grok_kernels.wants_packed(64, 8, spec, "cpu") == native
        assert not grok_kernels.wants_packed(64, 8, spec, "meta")
        assert not grok_kernels.wants_packed(63, 8, spec, "cpu")
        with grok_kernels.use_backend("reference"):
            assert not grok_kernels.wants_packed(64, 8, spec, "cpu")
    assert not grok_kernels.wants_packed(64, 8, grok_kernels.Spec("fp32"), "cpu")
    monkeypatch.setattr(registry, "_missing", {"cpu": "not built"})
    assert not grok_kernels.wants_packed(64, 8, grok_kernels.Spec("int8"), "cpu")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 60, 4), torch.int8), ((1, 64, 6), torch.int8), ((64, 4), torch.int8), ((1, 64, 4), torch.float32)],
)
def test_refuses_what_has_no_packed_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape {shape}")):
        layouts.pack(torch.zeros(shape, dtype=dtype))


def scales(dtype: torch.dtype, e: int, groups: int, n: int) -> Tensor | None:
    return None if dtype == torch.bfloat16 else randn(e, groups, n, seed=3).abs()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_take_either_layout(dtype: torch.dtype) -> None:
    groups = 4 if dtype == torch.int8 else 1
    w13 = Weight.of(values(2, 128, 64, dtype), scales(dtype, 2, groups, 128))
    w2 = Weight.of(values(2, 64, 64, dtype), scales(dtype, 2, groups, 64))
    packed13, packed2 = w13.with_layout("panels"), w2.with_layout("panels")
    x, offsets = randn(5, 64, dtype=torch.bfloat16), torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.equal(grok_kernels.grouped_gemm(x, packed13, offsets), grok_kernels.grouped_gemm(x, w13, offsets))
    routing = grok_kernels.route_topk(x, randn(2, 64), 2)
    assert torch.equal(grok_kernels.moe(x, *routing, packed13, packed2), grok_kernels.moe(x, *routing, w13, w2))


# The object


@pytest.mark.parametrize(("name", "dtype"), [("int8", torch.int8), ("fp8_e4m3", FP8), ("bf16", torch.bfloat16)])
def test_what_a_weight_says_of_itself(name: str, dtype: torch.dtype) -> None:
    plain, scale = values(2, 64, 8, dtype), scales(dtype, 2, 1, 64)
    rows = Weight.of(plain, scale)
    panels = rows.with_layout("panels")
    for weight, layout in ((rows, "rows"), (panels, "panels")):
        assert (weight.format, weight.layout, weight.shape, weight.dtype) == (name, layout, (2, 64, 8), dtype)
        assert weight.scales is scale
        assert weight.nbytes == 2 * 64 * 8 * dtype.itemsize + (0 if scale is None else 2 * 64 * 4)
        assert weight.with_layout(layout) is weight
    assert torch.equal(raw(panels.with_layout("rows").values), raw(plain))
    assert Weight.of(panels.values, scale, "panels").shape == rows.shape
    with pytest.raises(AttributeError):
        rows.layout = "panels"


PACKED = layouts.pack(randint8(1, 64, 8))


@pytest.mark.parametrize(
    ("args", "error"),
    [
        ((randn(1, 4, 8).half(),), "values has dtype float16, expected float32 or bfloat16 or int8"),
        ((randn(4, 8),), r"values has shape \(4, 8\), expected 3 dimensions \(E, N, K\)"),
        ((randn(1, 4, 8).transpose(1, 2),), r"values has strides .*, expected its last dimension contiguous"),
        (("values",), r"values is values, expected a tensor \(E, N, K\)"),
        ((randn(1, 4, 8), torch.ones(1, 1, 4)), "scales is given, expected None for format fp32"),
        ((randint8(1, 4, 8),), r"scales is None, expected \(E, groups, N\) for format int8"),
        ((randn(1, 4, 8).to(FP8),), r"scales is None, expected \(E, groups, N\) for format fp8_e4m3"),
        ((randint8(1, 4, 8), torch.ones(1, 0, 4)), "scales has 0 groups, expected a divisor of K=8"),
        ((randint8(1, 4, 8), torch.ones(1, 3, 4)), "scales has 3 groups, expected a divisor of K=8"),
        ((randn(1, 4, 8).to(FP8), torch.ones(1, 3, 4)), "scales has 3 groups, expected a divisor of K=8"),
        ((randint8(1, 4, 8), torch.ones(1, 1, 5)), r"scales has shape \(1, 1, 5\), .* with N=4 from values"),
        ((randint8(2, 4, 8), torch.ones(1, 1, 4)), r"scales has shape \(1, 1, 4\), .* with E=2 from values"),
        ((randint8(1, 4, 8), torch.ones(1, 4)), r"scales has shape \(1, 4\), expected 3 dimensions"),
        ((randint8(1, 4, 8), torch.ones(1, 1, 4).double()), "scales has dtype float64, expected float32"),
        ((randint8(1, 4, 8), torch.ones(1, 1, 4, device="meta")), "scales is on meta, expected cpu as values"),
        ((randn(1, 4, 8), None, "columns"), "layout='columns', expected one of rows, panels"),
        ((randint8(1, 64, 8), torch.ones(1, 1, 64), "panels"), r"values have shape \(1, 64, 8\), .*expected what"),
        ((PACKED.transpose(3, 4), torch.ones(1, 1, 64), "panels"), ".*expected what packed_shape gives, contiguous"),
        ((PACKED, torch.ones(1, 1, 128), "panels"), r"scales has shape \(1, 1, 128\), .* with N=64 from values"),
    ],
)  # fmt: skip
def test_refuses_tensors_that_are_no_weight(args: Any, error: str) -> None:
    with pytest.raises(ValueError, match=f"^Weight: {error}"):
        Weight.of(*args)


def test_refuses_a_weight_of_another_shape() -> None:
    packed = Weight.of(randint8(1, 64, 12), torch.ones(1, 1, 64)).with_layout("panels")
    with pytest.raises(ValueError, match=r"weight has shape \(1, 64, 12\), expected \(E, N, K\) with K=8"):
        grok_kernels.grouped_gemm(randn(2, 8), packed)


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_a_backend_refuses_by_name_a_format_that_it_lacks(backend: str) -> None:
    kernel = registry._kernels["grouped_gemm", backend]
    weight = Weight("q4_k", "rows", (1, 64, 256), (randn(1, 64, 256),))
    reason = kernel.supports(randn(2, 256), weight, None, None, None)
    assert reason is not None
    assert reason.startswith(f"a weight has format q4_k, the {backend} backend takes ")


def test_a_weight_that_requires_grad_is_not_cached() -> None:
    weight = Weight.of(randn(1, 4, 8))
    if not STATUS.available:
        pytest.skip(STATUS.reason)
    assert weight.signature is not None
    weight.values.requires_grad_()
    assert weight.signature is None
    assert grok_kernels.grouped_gemm(randn(2, 8), weight).requires_grad


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (
            {"shape": (1, 64, 16)},
            r"weight of format int8 has shape \(1, 64, 16\), but that of its planes is \(1, 64, 8\)",
        ),
        ({"shape": (1, 64, 8), "layout": "panels"}, "weight of format int8: Weight: values have shape"),
        ({"format": "fp8_e4m3"}, "weight of format fp8_e4m3: Weight: values has dtype int8, expected float8_e4m3fn"),
        ({"planes": (randint8(1, 64, 8),)}, "weight has 1 planes, expected values, scales"),
        ({"planes": (randint8(1, 64, 8), torch.ones(1, 1, 63))}, "weight of format int8: Weight: scales has shape"),
        ({"planes": (randint8(1, 64, 8), torch.ones(1, 3, 64))}, "weight of format int8: Weight: scales has 3 groups"),
        ({"planes": (randint8(1, 64, 8), *torch.ones(2, 1, 1, 64))}, "weight has 3 planes, expected values, scales"),
    ],
)
def test_an_op_refuses_planes_that_are_not_the_weight_s(backend: str, changed: dict[str, Any], error: str) -> None:
    """The constructor takes anything; on a GPU a plane that is too small would be read beyond its end."""
    weight = replace(Weight.of(randint8(1, 64, 8), torch.ones(1, 1, 64)), **changed)
    x = randn(2, weight.shape[2])
    with grok_kernels.use_backend(backend), pytest.raises(ValueError, match=f"grouped_gemm: {error}"):
        grok_kernels.grouped_gemm(x, weight)
