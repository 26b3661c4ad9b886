"""The expert layer of the native CPU backend in halves: together they are the layer, and shares of them, as ranks hold
them, give its bits; and what the native functions refuse."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from grok_kernels import layouts, registry
from tests.kernels.cases import ints, randint8, randn

pytestmark = [
    pytest.mark.skipif("cpu" in registry._missing, reason="no native CPU kernels"),
    pytest.mark.usefixtures("isa"),
]
BF16, FP32, FP8, INT8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8
FORMATS = {INT8: "int8", FP8: "fp8_e4m3", BF16: "bf16", FP32: "fp32"}
T, D, F, E, A = 19, 128, 256, 4, 2


class Weight(NamedTuple):
    format: str
    layout: str
    shape: tuple[int, int, int]
    planes: tuple[Tensor, ...]

    def rows(self, rows: slice) -> Weight:
        """These rows of every matrix."""
        return of(self.planes[0][:, rows], *(scale[..., rows] for scale in self.planes[1:]))

    def experts(self, experts: slice) -> Weight:
        return of(*(plane[experts] for plane in self.planes))

    def panels(self) -> Weight:
        packed = layouts.pack(self.planes[0])
        return self._replace(layout="panels", planes=(packed, *self.planes[1:]))


def of(values: Tensor, *scale: Tensor) -> Weight:
    e, n, k = values.shape
    return Weight(FORMATS[values.dtype], "rows", (e, n, k), (values, *scale))


def weight(n: int, k: int, dtype: torch.dtype, seed: int) -> Weight:
    if dtype in (BF16, FP32):
        return of(randn(E, n, k, seed=seed).to(dtype) * 0.1)
    values = randint8(E, n, k, seed=seed) if dtype == INT8 else randn(E, n, k, seed=seed).to(FP8)
    return of(values, 1e-3 + 0.01 * randn(E, 2 if dtype == INT8 else 1, n, seed=seed + 1).abs())


def stacked(w13: Weight, columns: slice) -> Weight:
    """The rows of gate and of up that compute these columns of act(gate) · up."""
    gate, up = w13.rows(slice(0, F)).rows(columns), w13.rows(slice(F, 2 * F)).rows(columns)
    values = torch.cat([gate.planes[0].view(torch.uint8), up.planes[0].view(torch.uint8)], 1).view(gate.planes[0].dtype)
    return of(values, *(torch.cat(pair, 2) for pair in zip(gate.planes[1:], up.planes[1:], strict=True)))


def tokens(t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, topk_weights and experts."""
    experts = torch.rand(t, E, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :A].int().contiguous()
    return randn(t, D, dtype=dtype), randn(t, A, seed=9).abs(), experts


CASES = [
    (x, w, f) for x in (BF16, FP32) for w in FORMATS for f in ("none", "int8", "fp8") if w != FP32 or x == FP32
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "weight_dtype", "act_format"), CASES, ids=str)
def test_the_halves_are_the_layer_for_any_shares(
    dtype: torch.dtype, weight_dtype: torch.dtype, act_format: str
) -> None:
    from grok_kernels import _C

    x, topk, experts = tokens(T, dtype)
    w13, w2 = weight(2 * F, D, weight_dtype, 1), weight(D, F, weight_dtype, 5)
    expected = _C.moe(x, topk, experts, w13, w2, "gelu_tanh", act_format)
    order, offsets = _C.group_tokens(experts, E)
    rows, scale = _C.moe_up(x, order, offsets, A, w13, "gelu_tanh", act_format)
    assert (scale is None) == (act_format == "none")
    assert torch.equal(_C.moe_down(rows, scale, topk, order, offsets, w2, dtype), expected)

    # a range of F on each of two ranks
    halves = slice(0, F // 2), slice(F // 2, F)
    parts = [_C.moe_up(x, order, offsets, A, stacked(w13, half), "gelu_tanh", act_format) for half in halves]
    assert torch.equal(torch.cat([part[0].view(torch.uint8) for part in parts], 1), rows.view(torch.uint8))
    if scale is not None:
        assert torch.equal(torch.cat([part[1] for part in parts], 1), scale)
    # a range of D
    shares = [_C.moe_down(rows, scale, topk, order, offsets, w2.rows(slice(*d)), dtype) for d in ((0, 64), (64, D))]
    assert torch.equal(torch.cat(shares, 1), expected)
    # some experts: their rows are gathered, weighted and summed in the order of the experts
    total = torch.zeros(T, D)
    for first, last in ((0, 3), (3, E)):
        own = slice(int(offsets[first]), int(offsets[last]))
        begin = offsets[first : last + 1] - offsets[first]
        inner, inner_scale = _C.moe_up(
            x, order[own], begin, A, w13.experts(slice(first, last)), "gelu_tanh", act_format
        )
        down = _C.grouped_gemm(inner, w2.experts(slice(first, last)), begin, inner_scale, FP32)
        for slot, row in zip(order[own].tolist(), down, strict=True):
            total[slot // A] += topk[slot // A, slot % A] * row
    assert torch.equal(total.to(dtype), expected)


@pytest.mark.parametrize("layout", ["rows", "panels"])
@pytest.mark.parametrize("t", [0, 1, T, 1030])
def test_a_grouping_that_is_given_is_used(t: int, layout: str) -> None:
    from grok_kernels import _C

    x, topk, experts = tokens(t, BF16)
    w13, w2 = weight(2 * F, D, INT8, 1), weight(D, F, INT8, 5)
    if layout == "panels":
        w13, w2 = w13.panels(), w2.panels()
    args = x, topk, experts, w13, w2, "silu", "none"
    order, offsets = _C.group_tokens(experts, E)
    assert torch.equal(_C.moe(*args, order, offsets), _C.moe(*args))
    if t == 1030:  # tokens are taken 1024 at a time
        assert not torch.equal(_C.moe(*args, order.roll(1), offsets), _C.moe(*args))
        order[7] = t * A
        with pytest.raises(ValueError, match=rf"moe: order\[7\] is {t * A}, expected"):
            _C.moe(*args, order, offsets)


def refused(message: str, **changed: Any) -> None:
    from grok_kernels import _C

    x, topk, experts = tokens(3, BF16)
    args = {
        "x": x, "topk_weights": topk, "experts": experts, "w13": weight(2 * F, D, INT8, 1), "w2": weight(D, F, INT8, 5),
        "activation": "silu", "act_format": "none",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        _C.moe(**{**args, **changed})


def test_refuses_names_that_it_does_not_know() -> None:
    refused("moe: activation='relu', expected gelu_tanh, gelu or silu", activation="relu")
    refused("moe: activation='', expected", activation="")
    refused("moe: act_format='int4', expected none, fp8 or int8", act_format="int4")
    w = weight(D, F, INT8, 5)
    refused("moe: w2 has format 'q4_k', expected one of int8, fp8_e4m3, bf16, fp32, int4", w2=w._replace(format="q4_k"))
    refused("moe: w2 has layout 'columns', expected rows or panels", w2=w._replace(layout="columns"))


def test_refuses_a_tensor_in_place_of_a_weight() -> None:
    from grok_kernels import _C

    values = randn(1, D, F)
    with pytest.raises(TypeError, match="Weight"):
        _C.grouped_gemm(randn(2, F), values, None, None, None)
    with pytest.raises(TypeError, match="Weight"):
        _C.grouped_gemm(randn(2, F), of(values)._replace(shape=(D, F)), None, None, None)


def test_refuses_planes_that_do_not_fit() -> None:
    w = weight(D, F, INT8, 5)
    values, scale = w.planes
    for message, planes in {
        "w2 has 1 planes, expected 2 of format int8": (values,),
        "w2 has dtype BFloat16, expected Char": (values.to(BF16), scale),
        r"the values of w2 have shape \[4, 127, 256\], expected \(4, 128, 256\)": (values[:, 1:], scale),
        "w2 has strides": (values.transpose(1, 2).contiguous().transpose(1, 2), scale),
        r"the scales of w2 have shape \[4, 2, 127\]": (values, scale[..., 1:]),
        r"the scales of w2 have shape \[4, 3, 128\]": (values, torch.cat([scale, scale[:, :1]], 1)),
        "the scales of w2 .* dtype Double": (values, scale.double()),
        "w2 is on meta": (values.to("meta"), scale),
    }.items():
        refused(f"moe: {message}", w2=w._replace(planes=planes))
    refused("moe: the values of w2 have shape", w2=w._replace(layout="panels"))
    refused(r"moe: w13 is \(4, 512, 128\) and w2 \(4, 128, 128\)", w2=weight(D, 128, INT8, 5))


def test_refuses_a_grouping_that_would_leave_memory() -> None:
    order, offsets = torch.arange(6, dtype=torch.int32), ints(0, 2, 4, 6, 6)
    for bad in (-1, 6):
        refused(rf"moe: order\[3\] is {bad}, expected 0\.\.T\*A-1=5", order=ints(0, 1, 2, bad, 4, 5), offsets=offsets)
    refused(r"moe: offsets is \[0, 2, 1, 6, 6\], expected to ascend", order=order, offsets=ints(0, 2, 1, 6, 6))
    refused(r"moe: offsets is \[0, 2, 4, 6, 7\], expected to ascend", order=order, offsets=ints(0, 2, 4, 6, 7))
    refused("moe: order has shape", order=order[:5], offsets=offsets)
    refused("moe: offsets is None, expected both or none", order=order)


def test_the_halves_refuse_what_would_leave_memory() -> None:
    from grok_kernels import _C

    x, topk, experts = tokens(3, BF16)
    w13, w2 = weight(2 * F, D, INT8, 1), weight(D, F, INT8, 5)
    order, offsets = _C.group_tokens(experts, E)
    rows, scale = _C.moe_up(x, order, offsets, A, w13, "silu", "int8")
    with pytest.raises(ValueError, match=r"moe_up: order\[0\] is 6, expected 0\.\.T\*A-1=5"):
        _C.moe_up(x, torch.full_like(order, 6), offsets, A, w13, "silu", "int8")
    with pytest.raises(ValueError, match="moe_up: active=0, expected at least 1"):
        _C.moe_up(x, order, offsets, 0, w13, "silu", "int8")
    with pytest.raises(ValueError, match=r"moe_down: rows has shape \[5, 256\], expected \(R, F\) with R=6"):
        _C.moe_down(rows[1:], scale, topk, order, offsets, w2, BF16)
    with pytest.raises(ValueError, match="moe_down: row_scale is None for rows of Char"):
        _C.moe_down(rows, None, topk, order, offsets, w2, BF16)
    with pytest.raises(ValueError, match=r"moe_down: row_scale has shape \[6, 1\], expected \(6, 2\)"):
        _C.moe_down(rows, scale[:, :1], topk, order, offsets, w2, BF16)
    with pytest.raises(ValueError, match="grouped_gemm: x_scale is None for x of Char"):
        _C.grouped_gemm(rows, w2, offsets, None, None)
    with pytest.raises(ValueError, match="grouped_gemm: out_dtype has dtype Double"):
        _C.grouped_gemm(rows, w2, offsets, scale, torch.float64)
