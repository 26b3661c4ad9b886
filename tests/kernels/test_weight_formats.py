"""Formats whose scales are shared by groups of columns: what their planes mean, and how they lie in panels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight, layouts, registry
from grok_kernels.formats import FORMATS, Spec
from tests.kernels.cases import randn
from tests.kernels.group_weights import FP16, FP32, KINDS, Kind, random_weight, spec_of
from tests.kernels.oracle import assert_near, f64

CODES = [kind for kind in KINDS if FORMATS[kind[0]].in_bit_planes]
BACKENDS = ("reference", "cpu")


def exact(weight: Weight) -> np.ndarray[Any, Any]:
    """(E, N, K) in float64, one value at a time."""
    planes = {name: f64(plane) for name, plane in weight.named_planes().items()}
    e, n, k = weight.shape
    w = np.empty((e, n, k))
    for index in np.ndindex(e, n, k):

        def of(name: str, at: tuple[int, ...] = index) -> float:
            groups = planes[name].shape[1]
            return float(planes[name][at[0], at[2] // (k // groups), at[1]])

        scale = of("scales") * (of("subscales") if "subscales" in planes else 1)
        minimum = 0.0
        if "subminima" in planes:
            minimum = of("minima") * of("subminima")
        elif "minima" in planes:
            minimum = -of("minima")
        elif "zeros" in planes:
            minimum = of("scales") * of("zeros")
        w[index] = scale * planes["values"][index] - minimum
    return w


def served(kind: Kind, backend: str) -> None:
    if not grok_kernels.backends()["grouped_gemm"][backend].available:
        pytest.skip("not built")
    takes = registry.taken(backend)
    if kind[0] not in takes.formats or (kind[0] == "int8" and kind[3] == FP16 and not takes.fp16_scales):
        pytest.skip(f"the {backend} backend does not take {kind}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_are_those_of_the_formula(kind: Kind, backend: str) -> None:
    """Of odd numbers of rows and outputs, an empty expert among them."""
    served(kind, backend)
    k = 512 if kind[2] else 3 * kind[1]
    weight = random_weight(spec_of(kind, k), 3, 37, k)
    x, offsets = randn(5, k, seed=1), torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    w = exact(weight)
    expected = np.concatenate([f64(x[:2]) @ w[0].T, f64(x[2:]) @ w[2].T])
    size = np.concatenate([np.abs(f64(x[:2])) @ np.abs(w[0].T), np.abs(f64(x[2:])) @ np.abs(w[2].T)])
    with grok_kernels.use_backend(backend):
        assert_near(grok_kernels.grouped_gemm(x, weight, offsets), expected, 2e-6, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_without_columns_products_are_zero(kind: Kind, backend: str) -> None:
    served(kind, backend)
    weight = random_weight(Spec(kind[0], 1, int(bool(kind[2])), kind[3]), 1, 64, 0)
    rows = [(torch.zeros(3, 0, dtype=dtype), None) for dtype in (torch.float32, torch.bfloat16)]
    with grok_kernels.use_backend(backend):
        for x, scale in [*rows, (torch.zeros(3, 0, dtype=torch.int8), torch.ones(3, 1))]:
            for held in (weight, weight.with_layout("panels")) if backend == "cpu" else (weight,):
                y = grok_kernels.grouped_gemm(x, held, None, scale, torch.float32)
                assert torch.equal(y, torch.zeros(3, 64)), (x.dtype, held.layout)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_dequantising_rounds_once(kind: Kind) -> None:
    """Products with rows of the identity are the weights: S · q is exact for scales of fp16."""
    k = 512 if kind[2] else 2 * kind[1]
    weight = random_weight(spec_of(kind, k), 1, 5, k)
    w = exact(weight)[0]
    with grok_kernels.use_backend("reference"):
        got = grok_kernels.grouped_gemm(torch.eye(k), weight)
    expected = torch.from_numpy(w.astype(np.float32)).T
    if kind[3] == FP16:
        assert torch.equal(got, expected)
    else:
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6 * float(np.abs(w).max()))


@pytest.mark.parametrize("kind", CODES, ids=str)
def test_packs_and_unpacks_every_bit(kind: Kind) -> None:
    k = 768 if kind[2] else 3 * kind[1]
    rows = random_weight(spec_of(kind, k), 2, 192, k)
    panels = rows.with_layout("panels")
    assert panels.layout == "panels"
    assert panels.spec == rows.spec == spec_of(kind, k)
    assert panels.nbytes == panels.spec.nbytes("panels", panels.shape)
    assert all(plane.is_contiguous() for plane in panels.planes)
    again = Weight.of(**panels.named_planes(), layout="panels", format=panels.format)
    assert again.shape == rows.shape
    for plane, expected in zip(panels.with_layout("rows").planes, rows.planes, strict=True):
        assert torch.equal(plane, expected)
    for name, plane in list(panels.named_planes().items())[1:]:
        assert torch.equal(plane[1, 2, :, 5], rows.named_planes()[name][1, :, 133])


@pytest.mark.parametrize("kind", [("int4", 32, 0, FP16), ("int5", 32, 0, FP16), ("int6_k", 256, 16, FP16)], ids=str)
def test_where_each_value_lies(kind: Kind) -> None:
    """By the definition of the layout: low bits in four runs of 8 columns, then the bits above."""
    rows = random_weight(spec_of(kind, 256), 1, 64, 256)
    blocks = rows.with_layout("panels").values[0, 0].numpy().view("<u4")[..., 0]  # (K / 32, bits, 64)
    format = FORMATS[kind[0]]
    high = format.bits - 4
    for n in (0, 1, 63):
        for k in range(256):
            eight, j, s = k % 32 // 8, k % 8 // 2, k % 2
            code = int(blocks[k // 32, eight, n]) >> 4 * j + 16 * s & 15
            if high:
                run = 4 + eight // (4 // high)
                at = 16 * s + 8 * (j >> 1) + high * ((j & 1) + 2 * (eight % (4 // high)))
                code |= (int(blocks[k // 32, run, n]) >> at & (1 << high) - 1) << 4
            assert code - format.zero_point == rows.values[0, n, k], (n, k)


def test_bytes_are_those_of_the_files() -> None:
    """Bits a weight: GGUF's own, but 8 instead of 6 for the second level's scales."""
    bits = {"int4_k": 4.625, "int5_k": 5.625, "int6_k": 6.5625, "int4": 4.5, "int4_min": 5.0, "int8": 8.5}
    shape = (2, 256, 4096)
    for kind in KINDS:
        if kind[3] == FP16 and kind[0] in bits:
            assert 8 * spec_of(kind, 4096).nbytes("panels", shape) / (2 * 256 * 4096) == bits[kind[0]]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_single_rows_are_dequantised(
    kind: Kind, layout: grok_kernels.Layout, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(layouts, "native", None)
    k = 512 if kind[2] else 2 * kind[1]
    weight = random_weight(spec_of(kind, k), 1, 128, k)
    rows = torch.tensor([3, 127, 64, 3], dtype=torch.int32)
    with grok_kernels.use_backend("reference"):
        expected = grok_kernels.grouped_gemm(torch.eye(k), weight).T[rows.long()]
    held = weight.with_layout(layout)
    assert torch.equal(grok_kernels.weight_rows(held, rows), expected)
    assert torch.equal(grok_kernels.weight_rows(held, rows, 0.3, torch.bfloat16), (expected * 0.3).bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("up", [("int8", 64, 0, FP32), ("int4_k", 256, 32, FP16)], ids=str)
@pytest.mark.parametrize("down", [("int8", 256, 0, FP32), ("int6_k", 256, 16, FP16)], ids=str)
def test_experts_may_have_two_formats(up: Kind, down: Kind, backend: str) -> None:
    """As files of mixed types have them, and in either layout."""
    served(up, backend)
    served(down, backend)
    w13, w2 = random_weight(spec_of(up, 256), 2, 512, 256), random_weight(spec_of(down, 256), 2, 256, 256, seed=1)
    x = randn(3, 256)
    routing = grok_kernels.route_topk(x, randn(2, 256, seed=2), 2)
    dense = [Weight.of(torch.from_numpy(exact(w)).float()) for w in (w13, w2)]
    with grok_kernels.use_backend("reference"):
        expected = grok_kernels.moe(x, *routing, *dense)
    with grok_kernels.use_backend(backend):
        for pair in ((w13, w2), (w13.with_layout("panels"), w2.with_layout("panels"))):
            error = (grok_kernels.moe(x, *routing, *pair) - expected).norm(dim=-1)
            assert (error <= 2e-6 * expected.norm(dim=-1)).all()


def test_writes_a_range_of_rows() -> None:
    for kind in CODES:
        whole = random_weight(spec_of(kind, 256), 2, 128, 256)
        for layout in ("rows", "panels"):
            room = Weight.empty(whole.spec, layout, whole.shape, "cpu")  # type: ignore[arg-type]
            for e in range(2):
                for row in (64, 0):
                    planes = whole.named_planes().items()
                    room.write(e, row, {name: _rows(name, plane[e], row) for name, plane in planes})
            for plane, expected in zip(room.with_layout("rows").planes, whole.planes, strict=True):
                assert torch.equal(plane, expected)
        with pytest.raises(ValueError, match=r"write: rows 32\.\.96, expected multiples of 64"):
            room.write(0, 32, {"values": whole.values[0, :64]})


def _rows(name: str, plane: Tensor, row: int) -> Tensor:
    return plane[row : row + 64] if name == "values" else plane[:, row : row + 64]


@pytest.mark.parametrize(
    ("kind", "changed", "error"),
    [
        (KINDS[2], {"scales": None}, r"scales is None, expected \(E, groups, N\) for format int4"),
        (KINDS[2], {"minima": torch.ones(1, 8, 64)}, "minima is given, expected None for format int4"),
        (KINDS[2], {"scales": torch.ones(1, 8, 64).double()}, "scales has dtype float64, expected float32 or float16"),
        (KINDS[2], {"values": torch.zeros(1, 64, 256)}, "values has dtype float32, expected int8"),
        (KINDS[2], {"format": "int7"}, "format='int7', expected one of fp32, bf16, int8, fp8_e4m3, int4, "),
        (KINDS[6], {"minima": torch.ones(1, 8, 64)}, "minima has dtype float32, expected float16 as scales"),
        (KINDS[6], {"minima": torch.ones(1, 4, 64).half()}, r"minima has shape \(1, 4, 64\), .* groups=8 from scales"),
        (KINDS[4], {"zeros": torch.ones(1, 2, 64).char()}, "zeros has dtype int8, expected uint8"),
        (KINDS[7], {"scales": torch.ones(1, 1, 64)}, "scales has dtype float32, expected float16"),
        (KINDS[-1], {"scales": torch.ones(1, 3, 64).half()}, "scales has 3 groups, expected a divisor of K=256"),
        (
            KINDS[7],
            {name: torch.ones(1, 16, 64).half() for name in ("scales", "minima")},
            "subscales has 8 groups, expected a multiple of the 16 of scales",
        ),
        (KINDS[7], {"subminima": None}, r"subminima is None, expected \(E, subgroups, N\) for format int4_k"),
        (KINDS[-1], {"subscales": torch.ones(1, 16, 64).byte()}, "subscales has dtype uint8, expected int8"),
    ],
)
def test_names_what_is_wrong(kind: Kind, changed: dict[str, Any], error: str) -> None:
    weight = random_weight(spec_of(kind, 256), 1, 64, 256)
    planes: dict[str, Any] = {**weight.named_planes(), "format": weight.format, **changed}
    with pytest.raises(ValueError, match=f"^Weight: {error}"):
        Weight.of(**planes)


def test_names_what_is_wrong_in_panels() -> None:
    weight = random_weight(Spec("int4_min", 8, 0, FP16), 1, 64, 256).with_layout("panels")
    planes: dict[str, Any] = {**weight.named_planes(), "format": "int4_min", "layout": "panels"}
    for changed, error in (
        ({"values": weight.values[:, :, :, :3]}, "values have shape"),
        ({"values": weight.values.char()}, "values have shape"),
        ({"format": "int5_min"}, r"values have shape .* expected \(1, 1, 8, 5, 64, 4\) of uint8 for format int5_min"),
        ({"scales": torch.ones(1, 8, 64).half()}, r"scales has shape \(1, 8, 64\), expected 4 dimensions"),
        ({"scales": torch.ones(1, 1, 8, 32).half()}, r"scales has shape \(1, 1, 8, 32\)"),
        ({"scales": torch.ones(1, 1, 8, 128).half()[..., ::2]}, "scales has strides"),
        ({name: torch.ones(1, 1, 32, 64) for name in ("scales", "minima")}, "format int4_min has groups of 8 columns"),
    ):
        with pytest.raises(ValueError, match=f"^Weight: {error}"):
            Weight.of(**planes | changed)
    for spec, n, k in ((Spec("int4", 32, 0, FP32), 64, 256), (Spec("int4", 1), 60, 32), (Spec("int4", 1), 64, 48)):
        with pytest.raises(ValueError, match=r"^with_layout: weight of format int4 has shape"):
            random_weight(spec, 1, n, k).with_layout("panels")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_backends_of_gpus_refuse_by_name(backend: str) -> None:
    supports = registry._kernels["grouped_gemm", backend].supports
    for kind in KINDS:
        weight = random_weight(spec_of(kind, 256), 1, 64, 256)
        if kind[0] != "int8" or kind[3] == FP16:
            reason = supports(randn(2, 256), weight, None, None, None)
            assert reason is not None
            named = "has scales of float16" if kind[0] == "int8" else f"has format {kind[0]}"
            assert named in reason
            assert f"the {backend} backend takes" in reason
    w13 = random_weight(Spec("int8", 1), 1, 128, 64)
    w2 = replace(random_weight(Spec("int8", 1), 1, 64, 64), format="fp8_e4m3")
    layer = (torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32), w13, w2, "gelu_tanh", "none", None, None)
    reason = registry._kernels["moe", backend].supports(randn(2, 64), *layer)
    assert reason is not None
    if backend == "triton":
        assert "the weights have formats int8 and fp8_e4m3" in reason


def test_which_formats_a_device_multiplies_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENV, raising=False)
    assert grok_kernels.takes_format("int8", "cpu")
    assert grok_kernels.mixes_formats("cpu")
    with grok_kernels.use_backend("reference"):
        assert all(grok_kernels.takes_format(format, "cpu") for format in FORMATS)
    with grok_kernels.use_backend("triton"):
        assert not grok_kernels.takes_format("int4_k", "cpu")
        assert not grok_kernels.takes_format("int8", "cpu", fp16_scales=True)
        assert not grok_kernels.mixes_formats("cpu")
    monkeypatch.setattr(registry, "_missing", {"cpu": "not built"})
    assert grok_kernels.takes_format("int4_k", "cpu")
