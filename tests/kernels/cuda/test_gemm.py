"""Products and the expert layer for Hopper, run by the host emulation: against the oracle, and the same bits however
run."""

from __future__ import annotations

import ctypes
import itertools
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight
from tests.kernels import oracle
from tests.kernels.cases import FP8, ints, randn
from tests.kernels.cuda.emulation import call
from tests.kernels.oracle import assert_near, f64

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
NAN = float("nan")
P, I64 = ctypes.c_void_p, ctypes.c_int64
E4M3 = 1  # Type::e4m3
ACTIVATIONS = {"gelu_tanh": 0, "gelu": 1, "silu": 2}


class Product(ctypes.Structure):
    _fields_ = (
        ("x_type", ctypes.c_int), ("weight_type", ctypes.c_int), ("x", P), ("x_scale", P), ("x_scale_row", I64),
        ("x_scale_group", I64), ("weight", P), ("weight_scale", P), ("offsets", P), ("rows", I64), ("n", I64),
        ("k", I64), ("experts", I64), ("weight_groups", I64),
    )  # fmt: skip


class GroupedGemm(ctypes.Structure):
    _fields_ = (("product", Product), ("y", P), ("y_is_float", ctypes.c_bool), ("order", P), ("row_weights", P))


class GateUp(ctypes.Structure):
    _fields_ = (
        ("product", Product), ("activation", ctypes.c_int), ("y", P), ("y_scale", P), ("y_scale_row", I64),
        ("y_scale_group", I64),
    )  # fmt: skip


class GatherQuantize(ctypes.Structure):
    _fields_ = (
        ("x", P), ("x_stride", I64), ("order", P), ("offsets", P), ("q", P), ("scale", P), ("scale_row", I64),
        ("scale_group", I64), ("rows", I64), ("dim", I64), ("active", I64), ("experts", I64),
    )  # fmt: skip


class Combine(ctypes.Structure):
    _fields_ = (("parts", P), ("y", P), ("tokens", I64), ("active", I64), ("dim", I64))


def at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor | None) -> Any:
    """x_scale (M, groups), of any strides."""
    (m, k), (e, n, _) = x.shape, weight.shape
    return Product(
        E4M3, E4M3, at(x), at(x_scale), x_scale.stride(0), 0 if x_scale.shape[1] == 1 else x_scale.stride(1),
        at(weight), at(weight_scale), at(offsets), m, n, k, e, 1,
    )  # fmt: skip


class Emulated:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.set_seed.argtypes = (ctypes.c_uint64,)

    def _call(self, params: Any) -> None:
        names = {GroupedGemm: "grouped_gemm", GateUp: "gate_up", GatherQuantize: "gather_quantize", Combine: "combine"}
        call(getattr(self.library, names[type(params)]), ctypes.byref(params))

    def gemm(
        self,
        x: Tensor,
        weight: Tensor,
        weight_scale: Tensor,
        offsets: Tensor | None,
        x_scale: Tensor,
        out_dtype: torch.dtype = torch.float32,
        order: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Tensor:
        """Rows that the kernel did not write are 7, one row past the last among them."""
        y = torch.full((x.shape[0] + 1, weight.shape[1]), 7.0, dtype=out_dtype)
        operands = product(x, x_scale, weight, weight_scale, offsets)
        self._call(GroupedGemm(operands, at(y), out_dtype == torch.float32, at(order), at(row_weights)))
        assert (y[-1] == 7).all()
        return y[:-1]

    def gate_up(
        self, x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, x_scale: Tensor, activation: str
    ) -> tuple[Tensor, Tensor]:
        m, f = x.shape[0], weight.shape[1] // 2
        y, scale = torch.full((m + 1, f), 7.0).to(FP8), torch.full((-(-f // 128) + 1, m), 7.0)
        operands = product(x, x_scale, weight, weight_scale, offsets)
        self._call(GateUp(operands, ACTIVATIONS[activation], at(y), at(scale), 1, m))
        assert (y[-1].float() == 7).all()
        assert (scale[-1] == 7).all()
        return y[:-1], scale[:-1].t()

    def gather_quantize(self, x: Tensor, order: Tensor, offsets: Tensor, active: int) -> tuple[Tensor, Tensor]:
        m, d = len(order), x.shape[1]
        q, scale = torch.full((m + 1, d), 7.0).to(FP8), torch.full((-(-d // 128) + 1, m), 7.0)
        self._call(
            GatherQuantize(
                at(x), x.stride(0), at(order), at(offsets), at(q), at(scale), 1, m, m, d, active, len(offsets) - 1
            )
        )
        assert (q[-1].float() == 7).all()
        assert (scale[-1] == 7).all()
        return q[:-1], scale[:-1].t()

    def combine(self, parts: Tensor, active: int) -> Tensor:
        t, d = len(parts) // active, parts.shape[1]
        y = torch.full((t + 1, d), 7.0, dtype=torch.bfloat16)
        self._call(Combine(at(parts), at(y), t, active, d))
        assert (y[-1] == 7).all()
        return y[:-1]

    def moe(
        self, x: Tensor, topk_weights: Tensor, experts: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor,
        w2_scale: Tensor, activation: str = "gelu_tanh",
    ) -> Tensor:  # fmt: skip
        with grok_kernels.use_backend("reference"):
            order, offsets = grok_kernels.group_tokens(experts, len(w2))
        q, q_scale = self.gather_quantize(x, order, offsets, experts.shape[1])
        inner, inner_scale = self.gate_up(q, w13, w13_scale, offsets, q_scale, activation)
        parts = self.gemm(inner, w2, w2_scale, offsets, inner_scale, torch.float32, order, topk_weights)
        return self.combine(parts, experts.shape[1])


@pytest.fixture(scope="module")
def machine(products: ctypes.CDLL) -> Emulated:
    return Emulated(products)


@pytest.fixture
def emulated(machine: Emulated) -> Iterator[Emulated]:
    yield machine
    machine.library.set_seed(0)
    machine.library.set_multiprocessors(4)


def case(m: int, n: int, k: int, offsets: list[int]) -> dict[str, Any]:
    e = len(offsets) - 1
    return {
        "x": randn(m, k).to(FP8), "weight": randn(e, n, k, seed=1).to(FP8), "offsets": ints(*offsets),
        "weight_scale": randn(e, 1, n, seed=2).abs() + 0.01, "x_scale": randn(m, -(-k // 128), seed=3).abs() + 0.1,
    }  # fmt: skip


def exact(c: dict[str, Any]) -> oracle.Array:
    w = oracle.dequantize_weight(f64(c["weight"]), f64(c["weight_scale"]))
    return oracle.gemm(oracle.dequantize_rows(f64(c["x"]), f64(c["x_scale"])), w, c["offsets"].tolist())


def test_tiles_divide_the_rounds_evenly(emulated: Emulated) -> None:
    columns = emulated.library.tile_columns
    columns.argtypes = (I64, I64, I64, ctypes.c_int)
    clusters = 66
    for rows in (1024, 4096, 8192, 16384):
        for n in (6144, 65536):
            width = columns(rows, n, 8, clusters)
            tiles = rows // 128 * -(-n // (2 * width))
            assert tiles / (-(-tiles // clusters) * clusters) > 0.95, (rows, n, width)
    assert columns(16384, 65536, 8, clusters) == 256
    assert columns(1, 8, 64, clusters) == 128
    assert {columns(m, n, 8, c) for m in (1024, 16384) for n in (6144, 264) for c in (2, 66)} == {128, 192, 256}


@pytest.mark.parametrize(("n", "width"), [(1016, 256), (760, 192), (248, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_of_tiles_across_their_borders(emulated: Emulated, dtype: torch.dtype, n: int, width: int) -> None:
    """Past a tile's rows and columns and the last of K, with experts that have no rows, and rows that have no
    expert."""
    m, offsets = 153, [0, 0, 130, 130, 149]
    emulated.library.set_multiprocessors(2)  # one cluster
    assert emulated.library.tile_columns(I64(m), I64(n), I64(4), 1) == width
    c = case(m, n, 272, offsets)
    c["weight"][[0, 2]] = torch.tensor(NAN).to(FP8)
    c["weight_scale"][[0, 2]] = NAN
    c["x"][149:], c["x_scale"][149:] = torch.tensor(NAN).to(FP8), NAN
    for seed in (0, 1):
        emulated.library.set_seed(seed)
        got = emulated.gemm(**c, out_dtype=dtype)
        assert (got[149:] == 7).all()
        idle = {**c, "x": c["x"][:149], "x_scale": c["x_scale"][:149], "weight": c["weight"].clone()}
        idle["weight"][[0, 2]] = torch.zeros(()).to(FP8)
        assert_near(got[:149], exact(idle), rel=2e-6)


@pytest.mark.parametrize("offsets", [None, [0, 1], [0, 64], [0, 65], [0, 127], [0, 128], [0, 129], [0, 0, 40, 168]])
def test_groups_of_any_size(emulated: Emulated, offsets: list[int] | None) -> None:
    """One row, whole warpgroups and whole tiles, which are stored by the copy engine, and one more or less."""
    c = case(33 if offsets is None else offsets[-1], 136, 128, offsets or [0, 33])
    got = emulated.gemm(**{**c, "offsets": None if offsets is None else c["offsets"]}, out_dtype=torch.bfloat16)
    assert_near(got, exact(c), rel=2e-6)


def test_scales_in_any_layout(emulated: Emulated) -> None:
    c = case(40, 136, 400, [0, 11, 40])
    expected = emulated.gemm(**c)
    coalesced = c["x_scale"].t().contiguous().t()
    assert torch.equal(emulated.gemm(**{**c, "x_scale": coalesced}), expected)
    one = c["x_scale"][:, :1]
    assert_near(emulated.gemm(**{**c, "x_scale": one.contiguous()}), exact({**c, "x_scale": one}), rel=2e-6)


def test_extreme_scales_and_values(emulated: Emulated) -> None:
    c = case(20, 136, 144, [0, 20])
    c["x_scale"][:4] = torch.tensor([[1e-30], [1e30], [0.0], [2.0**-109]])
    c["weight_scale"][0, 0, :3] = torch.tensor([1e-10, 1e5, 0.0])
    c["x"][5] = torch.full((144,), 448.0).to(FP8)
    c["weight"][0, 9] = torch.full((144,), -448.0).to(FP8)
    assert_near(emulated.gemm(**c), exact(c), rel=2e-6)
    c["x"][6, 143] = torch.tensor(NAN).to(FP8)
    got = emulated.gemm(**c)
    assert got.isnan().all(1).tolist() == [row == 6 for row in range(20)]
    assert got.isnan().any(1).tolist() == [row == 6 for row in range(20)]


def test_a_row_has_the_same_bits_alone_in_any_batch_and_in_any_order_of_threads(emulated: Emulated) -> None:
    c = case(200, 136, 272, [0, 150, 200])
    whole = emulated.gemm(**c)
    for row in (0, 149, 150, 199):
        own = {n: v[row : row + 1] if n.startswith("x") else v for n, v in c.items()}
        assert torch.equal(emulated.gemm(**{**own, "offsets": ints(0, int(row < 150), 1)}), whole[row : row + 1])
    for seed, multiprocessors in itertools.product((1, 2, 3), (2, 6)):
        emulated.library.set_seed(seed)
        emulated.library.set_multiprocessors(multiprocessors)
        assert torch.equal(emulated.gemm(**c), whole)


# Rows: gathered, quantised, combined


@pytest.mark.parametrize("d", [8, 128, 136, 1104, 2056])
def test_rows_are_gathered_and_quantised_exactly(emulated: Emulated, d: int) -> None:
    x = randn(7, d + 8, dtype=torch.bfloat16)[:, :d]
    for row, scale in enumerate((1.0, 0.0, 1e-35, 1e37, 1e-42, 1e-20)):
        x[row] *= scale
    order, offsets = ints(*torch.randperm(14).tolist()), ints(0, 5, 5, 12)
    q, scale = emulated.gather_quantize(x, order, offsets, 2)
    q_exact, scale_exact = oracle.quantize_fp8(f64(x[order[:12].long() // 2]), 128)
    assert np.array_equal(scale[:12].numpy(), scale_exact)
    assert np.array_equal(f64(q[:12]), q_exact.astype(np.float64))
    assert (q[12:].float() == 7).all()
    assert (scale[12:] == 7).all()


def test_quantised_nan_and_infinity(emulated: Emulated) -> None:
    x = randn(4, 256, dtype=torch.bfloat16)
    x[0, 5], x[1, 200], x[2, 7], x[2, 8] = NAN, float("inf"), -float("inf"), NAN
    q, scale = emulated.gather_quantize(x, ints(0, 1, 2, 3), ints(0, 4), 1)
    with grok_kernels.use_backend("reference"):
        expected = grok_kernels.quantize_fp8(x)
    assert torch.equal(scale.nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
    assert np.array_equal(f64(q), f64(expected[0]), equal_nan=True)


def test_parts_are_summed_first_to_last_and_rounded_once(emulated: Emulated) -> None:
    parts = randn(15, 1100)
    parts[0:3, 0] = torch.tensor([1e8, 1.0, -1e8])
    first, second, third = parts.view(5, 3, 1100).unbind(1)
    assert torch.equal(emulated.combine(parts, 3), ((first + second) + third).bfloat16())


# The expert layer


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_and_up_with_the_quantisation_of_their_product(emulated: Emulated, activation: str) -> None:
    """Of 176 columns the second group is short; the rows past it are those of the up projection, and count for
    nothing."""
    c = case(150, 2 * 176, 144, [0, 5, 5, 139, 147])
    c["x"][147:], c["weight"][1] = torch.tensor(NAN).to(FP8), torch.tensor(NAN).to(FP8)
    c["x_scale"] *= 0.1  # gates of about one
    q, scale = emulated.gate_up(**c, activation=activation)
    assert (q[147:].float() == 7).all()
    assert (scale[147:] == 7).all()
    c["weight"][1] = torch.zeros(()).to(FP8)
    both = exact({**c, "x": c["x"][:147], "x_scale": c["x_scale"][:147]})
    inner = np.vectorize(lambda x: oracle.activate(x, activation))(both[:, :176]) * both[:, 176:]
    size = np.abs(both[:, 176:]).max(-1)
    for group in (slice(0, 128), slice(128, 176)):
        expected = np.abs(inner[:, group]).max(-1) / 448
        got = f64(scale[:147, group.start // 128])
        assert np.allclose(got, expected, rtol=1e-4, atol=1e-6 * size.max())
        error = np.abs(f64(q[:147, group]) * got[:, None] - inner[:, group])
        assert (error <= np.abs(inner[:, group]) * 2.0**-4 + got[:, None] * 2.0**-9 + 1e-5 * size[:, None]).all()


def test_a_nan_of_the_weights_stays_in_its_group(emulated: Emulated) -> None:
    """Past the gate's last row lie those of the up projection, which a short last group must not count."""
    c = case(5, 2 * 176, 144, [0, 5])
    c["weight"][0, 176 + 3] = torch.tensor(NAN).to(FP8)
    scale = emulated.gate_up(**c, activation="silu")[1]
    assert scale.isnan().tolist() == [[True, False]] * 5


def layer(t: int, d: int, f: int, e: int = 4) -> dict[str, Any]:
    return {
        "x": randn(t, d).bfloat16(), "topk_weights": randn(t, 2, seed=7).abs(),
        "experts": torch.stack((torch.arange(t) % e, (torch.arange(t) * 3 + 1) % e), 1).int(),
        "w13": randn(e, 2 * f, d, seed=1).to(FP8), "w13_scale": randn(e, 1, 2 * f, seed=5).abs() * 0.05 + 0.01,
        "w2": randn(e, d, f, seed=2).to(FP8), "w2_scale": randn(e, 1, d, seed=6).abs() * 0.05 + 0.01,
    }  # fmt: skip


def distance(got: Tensor, expected: Tensor) -> float:
    return float(np.linalg.norm(f64(got) - f64(expected)) / np.linalg.norm(f64(expected)))


@pytest.mark.parametrize(
    ("t", "d", "f", "spread"), [(1, 144, 48, "even"), (37, 272, 160, "even"), (80, 128, 256, "one")]
)
def test_the_layer_as_the_reference(emulated: Emulated, t: int, d: int, f: int, spread: str) -> None:
    c = layer(t, d, f)
    if spread == "one":
        c["experts"][:] = 2
    got = emulated.moe(**c)
    with grok_kernels.use_backend("reference"):
        weights = Weight.of(c["w13"], c["w13_scale"]), Weight.of(c["w2"], c["w2_scale"])
        expected = grok_kernels.moe(c["x"], c["topk_weights"], c["experts"], *weights, act_format="fp8")
    assert distance(got, expected) < 2e-3  # a sum next to a rounding step may go either way
    emulated.library.set_seed(5)
    assert torch.equal(emulated.moe(**c), got)
    some = {n: v[t // 2 : t // 2 + 1] if n in ("x", "topk_weights", "experts") else v for n, v in c.items()}
    assert torch.equal(emulated.moe(**some), got[t // 2 : t // 2 + 1])


def test_a_nan_reaches_its_own_token_alone(emulated: Emulated) -> None:
    c = layer(6, 144, 64)
    c["x"][2, 5] = NAN
    assert emulated.moe(**c).isnan().any(1).tolist() == [row == 2 for row in range(6)]


BAD: list[tuple[str, Callable[[Emulated], object]]] = [
    ("M=4 N=16 K=24 E=1: K=24, expected a multiple of 16", lambda m: m.gemm(**case(4, 16, 24, [0, 4]))),
    ("N=12, expected a multiple of 8", lambda m: m.gemm(**case(4, 12, 16, [0, 4]))),
    ("E=65, expected 1..64", lambda m: m.gemm(**case(4, 16, 16, [0] * 65 + [4]))),
    ("no offsets, expected them for more than", lambda m: m.gemm(**{**case(4, 16, 16, [0, 4, 4]), "offsets": None})),
    ("order without row_weights, or y in bf16", lambda m: m.gemm(**case(4, 16, 16, [0, 4]), order=ints(0, 1, 2, 3))),
    ("N=48, expected a multiple of 32", lambda m: m.gate_up(**case(4, 48, 16, [0, 4]), activation="gelu")),
    ("D=12 and x_stride=12", lambda m: m.gather_quantize(randn(2, 12).bfloat16(), ints(0, 1), ints(0, 2), 1)),
    ("T=1 D=6: D=6, expected a multiple of 4", lambda m: m.combine(randn(2, 6), 2)),
]


@pytest.mark.parametrize(("message", "wrong"), BAD)
def test_the_launchers_refuse_with_the_shape(emulated: Emulated, message: str, wrong: Callable[..., object]) -> None:
    with pytest.raises(RuntimeError, match=message):
        wrong(emulated)
