"""The swapped-operand products for Hopper, run by the host emulation: int8 against the oracle, e4m3 with the bits of
the other kernels."""

from __future__ import annotations

import ctypes
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
from tests.kernels.cases import FP8, ints, randint8, randn
from tests.kernels.cuda import test_gemm as many
from tests.kernels.cuda.emulation import call
from tests.kernels.cuda.test_gemm import ACTIVATIONS, I64, NAN, GateUp, GroupedGemm, P, at, distance
from tests.kernels.oracle import assert_near, f64

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
BF16, INT8 = 0, 2  # of Type
FP32 = torch.float32


class GatherRows(ctypes.Structure):
    _fields_ = (
        ("x", P), ("x_stride", I64), ("order", P), ("offsets", P), ("y", P), ("rows", I64), ("dim", I64),
        ("active", I64), ("experts", I64),
    )  # fmt: skip


def padded(k: int) -> int:
    return -(-k // 128) * 128


def places(k: int) -> Tensor:
    """The column at each place of a row of `k` columns in the order of gather_rows, as its header has it."""
    s, m = torch.arange(padded(k)) % 128 // 16, torch.arange(padded(k)) % 16
    return torch.arange(padded(k)) // 128 * 128 + 32 * (m % 8 // 2) + 4 * s + 2 * (m // 8) + m % 2


def product(x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor | None, k: int) -> Any:
    e, n, _ = weight.shape
    return many.Product(
        BF16, INT8, at(x), None, 0, 0, at(weight), at(weight_scale), at(offsets), len(x), n, k, e, weight_scale.shape[1]
    )


class Swapped(many.Emulated):
    def swapped(self, params: Any, tokens: int) -> None:
        name = "swapped_gate_up" if isinstance(params, GateUp) else "swapped_grouped_gemm"
        call(getattr(self.library, name), ctypes.byref(params), I64(tokens))

    def gather(self, x: Tensor, order: Tensor | None = None, offsets: Tensor | None = None, active: int = 1) -> Tensor:
        m = len(x) if order is None else len(order)
        y = torch.full((m + 1, padded(x.shape[1])), 7.0, dtype=torch.bfloat16)
        experts = 0 if offsets is None else len(offsets) - 1
        params = GatherRows(at(x), x.stride(0), at(order), at(offsets), at(y), m, x.shape[1], active, experts)
        call(self.library.gather_rows, ctypes.byref(params))
        assert (y[-1] == 7).all()
        return y[:-1]

    def int8(
        self, x: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor | None, tokens: int,
        out_dtype: torch.dtype = FP32, order: Tensor | None = None, row_weights: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows that the kernel did not write are 7, one row past the last among them."""
        y, rows = torch.full((len(x) + 1, weight.shape[1]), 7.0, dtype=out_dtype), self.gather(x)
        operands = product(rows, weight, weight_scale, offsets, x.shape[1])
        self.swapped(GroupedGemm(operands, at(y), out_dtype == FP32, at(order), at(row_weights)), tokens)
        assert (y[-1] == 7).all()
        return y[:-1]

    def gate_up_int8(
        self, rows: Tensor, weight: Tensor, weight_scale: Tensor, offsets: Tensor, tokens: int, activation: str, k: int
    ) -> Tensor:
        """In the order of gather_rows, as are `rows`."""
        y = torch.full((len(rows) + 1, padded(weight.shape[1] // 2)), 7.0, dtype=torch.bfloat16)
        self.swapped(
            GateUp(product(rows, weight, weight_scale, offsets, k), ACTIVATIONS[activation], at(y), None, 0, 0), tokens
        )
        assert (y[-1] == 7).all()
        return y[:-1]

    def layer(
        self, x: Tensor, topk_weights: Tensor, experts: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor,
        w2_scale: Tensor, tokens: int, activation: str = "gelu_tanh",
    ) -> Tensor:  # fmt: skip
        with grok_kernels.use_backend("reference"):
            order, offsets = grok_kernels.group_tokens(experts, len(w2))
        rows = self.gather(x, order, offsets, experts.shape[1])
        inner = self.gate_up_int8(rows, w13, w13_scale, offsets, tokens, activation, x.shape[1])
        parts = torch.full((len(order), x.shape[1]), NAN)
        operands = product(inner, w2, w2_scale, offsets, w2.shape[2])
        self.swapped(GroupedGemm(operands, at(parts), True, at(order), at(topk_weights)), tokens)
        return self.combine(parts, experts.shape[1])


@pytest.fixture(scope="module")
def machine(products: ctypes.CDLL) -> Swapped:
    return Swapped(products)


@pytest.fixture
def emulated(machine: Swapped) -> Iterator[Swapped]:
    yield machine
    machine.library.set_seed(0)
    machine.library.set_multiprocessors(4)


def case(m: int, n: int, k: int, offsets: list[int], groups: int = 1) -> dict[str, Any]:
    e = len(offsets) - 1
    return {
        "x": randn(m, k).bfloat16(), "weight": randint8(e, n, k, seed=1), "offsets": ints(*offsets),
        "weight_scale": randn(e, groups, n, seed=2).abs() + 0.01,
    }  # fmt: skip


def exact(c: dict[str, Any]) -> oracle.Array:
    weight = oracle.dequantize_weight(f64(c["weight"]), f64(c["weight_scale"]))
    return oracle.gemm(f64(c["x"]), weight, c["offsets"].tolist())


# The parts


def test_every_int8_becomes_bf16_exactly(machine: Swapped) -> None:
    pairs = (ctypes.c_uint32 * 2)()
    for value in range(256):
        word = [value, value ^ 0xFF, 255 - value, value * 7 % 256]
        machine.library.convert(ctypes.c_uint32(int.from_bytes(bytes(word), "little")), pairs)
        got = torch.tensor([p >> s & 0xFFFF for p in pairs for s in (0, 16)]).short().view(torch.bfloat16)
        expected = torch.tensor(word).byte().view(torch.int8).bfloat16()
        assert torch.equal(got.view(torch.int16), expected.view(torch.int16))  # and no zero is negative


def test_blocks_of_few_rows_come_out_even_for_every_number_of_experts_hit(machine: Swapped) -> None:
    height = machine.library.even_height
    height.argtypes = (I64, I64, I64)
    assert height(6144, 8, 132) == 24
    for hit in range(1, 9):
        blocks = hit * 6144 // 48
        assert blocks / (-(-blocks // 132) * 132) > 0.96
    assert height(65536, 8, 132) == 32
    assert height(1024, 1, 132) == 8


@pytest.mark.parametrize("d", [2, 128, 130, 1100])
def test_rows_are_gathered_in_the_order_of_the_product(emulated: Swapped, d: int) -> None:
    x, order, offsets = randn(7, d + 6).bfloat16()[:, :d], ints(*torch.randperm(14).tolist()), ints(0, 5, 5, 12)
    assert [emulated.library.column_at(i) for i in range(128)] == places(128).tolist()
    zeros = torch.zeros(7, padded(d), dtype=torch.bfloat16)
    zeros[:, :d] = x
    assert torch.equal(emulated.gather(x), zeros[:, places(d)])
    got = emulated.gather(x, order, offsets, 2)
    assert torch.equal(got[:12], zeros[order[:12].long() // 2][:, places(d)])
    assert (got[12:] == 7).all()


# int8 × bf16

# Tokens of a tile; rows and multiprocessors that choose each height of a block, up to its 256 rows for many rows of x.
SHAPES = [(16, 136, 2, 8), (16, 136, 5, 16), (64, 96, 2, 24), (64, 200, 4, 32), (64, 264, 1, 128), (128, 264, 4, 128)]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("tokens", "n", "multiprocessors", "height"), SHAPES)
def test_int8_across_every_border(
    emulated: Swapped, tokens: int, n: int, multiprocessors: int, height: int, groups: int
) -> None:
    """Past a tile's rows and columns and the last of K, with experts that have no rows, and rows that have no
    expert."""
    last = 40 if tokens == 16 else 150 if height < 128 or tokens == 128 else 270  # of 64 tokens, more than 64 an expert
    m, offsets, k = last + 4, [0, 0, last - 19, last - 19, last], 384 if groups > 1 else 272
    emulated.library.set_multiprocessors(multiprocessors)
    if height < 128:
        assert emulated.library.even_height(n, 4, multiprocessors) == height
    c = case(m, n, k, offsets, groups)
    c["weight_scale"][[0, 2]] = NAN
    c["x"][last:] = NAN
    expected = exact({**c, "x": c["x"][:last], "weight_scale": c["weight_scale"].nan_to_num()})
    for seed, dtype in ((0, FP32), (1, torch.bfloat16)):
        emulated.library.set_seed(seed)
        got = emulated.int8(**c, tokens=tokens, out_dtype=dtype)
        assert (got[last:] == 7).all()
        assert_near(got[:last], expected, rel=2e-6)


@pytest.mark.parametrize("tokens", [16, 64, 128])
@pytest.mark.parametrize("offsets", [None, [0, 1], [0, 16], [0, 17], [0, 0, 40, 129]])
def test_groups_of_any_size(emulated: Swapped, offsets: list[int] | None, tokens: int) -> None:
    c = case(33 if offsets is None else offsets[-1], 40, 144, offsets or [0, 33])
    given = {**c, "offsets": None if offsets is None else c["offsets"]}
    assert_near(emulated.int8(**given, tokens=tokens, out_dtype=torch.bfloat16), exact(c), rel=2e-6)


def test_every_value_of_int8_and_of_the_scales(emulated: Swapped) -> None:
    c = case(9, 16, 256, [0, 9], groups=2)
    c["weight"][0, :, :] = torch.arange(256).byte().view(torch.int8)
    c["weight"][0, 1] = c["weight"][0, 1].flip(0)
    c["weight_scale"][0, 0, :3] = torch.tensor([1e-20, 1e10, 0.0])
    c["x"][3] = torch.tensor(3e15)
    size = exact({**c, "x": c["x"].abs(), "weight": c["weight"].float().abs()})
    assert_near(emulated.int8(**c, tokens=16), exact(c), rel=1e-6, size=size)
    c["x"][6, 255] = NAN
    got = emulated.int8(**c, tokens=16)
    assert got.isnan().all(1).tolist() == [row == 6 for row in range(9)]
    assert got.isnan().any(1).tolist() == [row == 6 for row in range(9)]


def test_a_row_has_the_same_bits_in_any_batch_any_tile_and_any_order_of_threads(emulated: Swapped) -> None:
    c = case(150, 136, 256, [0, 110, 150], groups=2)
    whole = emulated.int8(**c, tokens=64)
    for row in (0, 109, 110, 149):
        own = {**c, "x": c["x"][row : row + 1], "offsets": ints(0, int(row < 110), 1)}
        assert torch.equal(emulated.int8(**own, tokens=64), whole[row : row + 1])
    for seed, tokens, multiprocessors in ((1, 16, 1), (2, 64, 3), (3, 128, 2), (4, 128, 9)):
        emulated.library.set_seed(seed)
        emulated.library.set_multiprocessors(multiprocessors)
        assert torch.equal(emulated.int8(**c, tokens=tokens), whole)


@pytest.mark.parametrize(("tokens", "activation"), [(16, "gelu_tanh"), (64, "silu"), (128, "gelu")])
def test_gate_and_up_in_the_order_of_the_next_product(emulated: Swapped, tokens: int, activation: str) -> None:
    """Of 176 columns the second block is short; past them y is 0, though the weights go on."""
    c, f = case(150, 2 * 176, 128, [0, 5, 5, 139, 147]), 176
    c["x"][147:], c["weight_scale"][1] = NAN, NAN
    c["weight_scale"] *= 0.01  # gates of about one
    emulated.library.set_seed(tokens)
    rows = emulated.gather(c["x"])
    got = emulated.gate_up_int8(rows, c["weight"], c["weight_scale"], c["offsets"], tokens, activation, 128)
    assert (got[147:] == 7).all()
    both = exact({**c, "x": c["x"][:147], "weight_scale": c["weight_scale"].nan_to_num()})
    inner = np.zeros((147, 256))
    inner[:, :f] = np.vectorize(lambda x: oracle.activate(x, activation))(both[:, :f]) * both[:, f:]
    assert_near(got[:147], inner[:, places(f)], rel=3e-6)
    assert (got[:147, places(f) >= f] == 0).all()


def layer(t: int, d: int, f: int, groups13: int = 1, groups2: int = 1, e: int = 4) -> dict[str, Any]:
    return {
        "x": randn(t, d).bfloat16(), "topk_weights": randn(t, 2, seed=7).abs(),
        "experts": torch.stack((torch.arange(t) % e, (torch.arange(t) * 3 + 1) % e), 1).int(),
        "w13": randint8(e, 2 * f, d, seed=1), "w13_scale": randn(e, groups13, 2 * f, seed=5).abs() * 0.002 + 1e-4,
        "w2": randint8(e, d, f, seed=2), "w2_scale": randn(e, groups2, d, seed=6).abs() * 0.002 + 1e-4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("t", "d", "f", "groups", "tokens"), [(1, 144, 48, 1, 16), (37, 256, 256, 2, 64), (130, 128, 272, 1, 128)]
)
def test_the_layer_as_the_reference(emulated: Swapped, t: int, d: int, f: int, groups: int, tokens: int) -> None:
    c = layer(t, d, f, groups, groups)
    if tokens == 128:
        c["experts"][:, 0] = 2  # more than a tile of one expert
    got = emulated.layer(**c, tokens=tokens)
    with grok_kernels.use_backend("reference"):
        weights = Weight.of(c["w13"], c["w13_scale"]), Weight.of(c["w2"], c["w2_scale"])
        expected = grok_kernels.moe(c["x"], c["topk_weights"], c["experts"], *weights)
    assert distance(got, expected) < 3e-3  # a value next to a rounding step may go either way
    emulated.library.set_seed(5)
    assert torch.equal(emulated.layer(**c, tokens=tokens), got)
    some = {n: v[t // 2 : t // 2 + 1] if n in ("x", "topk_weights", "experts") else v for n, v in c.items()}
    assert torch.equal(emulated.layer(**some, tokens=tokens), got[t // 2 : t // 2 + 1])


def test_a_nan_reaches_its_own_token_alone(emulated: Swapped) -> None:
    c = layer(6, 144, 64)
    c["x"][2, 5] = NAN
    assert emulated.layer(**c, tokens=16).isnan().any(1).tolist() == [row == 2 for row in range(6)]


# e4m3 × e4m3: the kernel for many rows is the reference, bit for bit


def fp8_params(c: dict[str, Any], y: Tensor, order: Tensor | None, row_weights: Tensor | None) -> Any:
    operands = many.product(c["x"], c["x_scale"], c["weight"], c["weight_scale"], c["offsets"])
    return GroupedGemm(operands, at(y), y.dtype == FP32, at(order), at(row_weights))


@pytest.mark.parametrize("tokens", [16, 64])
@pytest.mark.parametrize(("n", "k", "multiprocessors"), [(136, 272, 2), (96, 256, 2), (200, 144, 4)])
def test_few_rows_have_the_bits_of_many(emulated: Swapped, n: int, k: int, multiprocessors: int, tokens: int) -> None:
    m, offsets = 76, [0, 0, 67, 67, 72]
    c = many.case(m, n, k, offsets)
    c["weight"][[0, 2]], c["weight_scale"][[0, 2]] = torch.tensor(NAN).to(FP8), NAN
    c["x"][72:], c["x_scale"][72:] = torch.tensor(NAN).to(FP8), NAN
    expected = {dtype: emulated.gemm(**c, out_dtype=dtype) for dtype in (FP32, torch.bfloat16)}
    order, row_weights = ints(*torch.randperm(m).tolist()), randn(m, seed=4)
    scattered = emulated.gemm(**c, order=order, row_weights=row_weights)
    emulated.library.set_multiprocessors(multiprocessors)
    for seed in (0, 3):
        emulated.library.set_seed(seed)
        for dtype, bits in expected.items():
            y = torch.full((m, n), 7.0, dtype=dtype)
            emulated.swapped(fp8_params(c, y, None, None), tokens)
            assert torch.equal(y, bits)
    y = torch.full((m, n), 7.0)
    emulated.swapped(fp8_params(c, y, order, row_weights), tokens)
    assert torch.equal(y, scattered)


@pytest.mark.parametrize(("tokens", "activation"), [(16, "gelu"), (64, "gelu_tanh"), (16, "silu")])
def test_few_rows_of_gate_and_up_have_the_bits_of_many(emulated: Swapped, tokens: int, activation: str) -> None:
    c = many.case(90, 2 * 176, 272, [0, 5, 5, 79, 87])
    c["x"][87:], c["weight"][1] = torch.tensor(NAN).to(FP8), torch.tensor(NAN).to(FP8)
    c["x_scale"] *= 0.1
    q, scale = emulated.gate_up(**c, activation=activation)
    for seed in (0, 3):
        emulated.library.set_seed(seed)
        y, y_scale = torch.full((90, 176), 7.0).to(FP8), torch.full((2, 90), 7.0)
        operands = many.product(c["x"], c["x_scale"], c["weight"], c["weight_scale"], c["offsets"])
        emulated.swapped(GateUp(operands, ACTIVATIONS[activation], at(y), at(y_scale), 1, 90), tokens)
        assert torch.equal(y.view(torch.uint8), q.view(torch.uint8))
        assert torch.equal(y_scale.t(), scale)


def test_one_scale_a_row_of_few(emulated: Swapped) -> None:
    c = many.case(20, 40, 400, [0, 11, 20])
    c["x_scale"] = c["x_scale"][:, :1].contiguous()
    y = torch.full((20, 40), 7.0)
    emulated.swapped(fp8_params(c, y, None, None), 16)
    assert torch.equal(y, emulated.gemm(**c))


def int8_wrong(**changes: Any) -> Callable[[Swapped], object]:
    c = {**case(4, 16, 256, [0, 4]), "tokens": 16, **changes}
    return lambda m: m.int8(**c)


def fp8_wrong(tokens: int) -> Callable[[Swapped], object]:
    c = many.case(4, 16, 16, [0, 4])
    return lambda m: m.swapped(fp8_params(c, torch.zeros(4, 16), None, None), tokens)


BAD: list[tuple[str, Callable[[Swapped], object]]] = [
    ("swapped_grouped_gemm of M=4 N=16 K=256 E=1: tokens=32, expected 16 or 64, or 128", int8_wrong(tokens=32)),
    ("weight_groups=4, expected 1, or groups of a multiple of 128", int8_wrong(weight_scale=torch.ones(1, 4, 16))),
    ("order without row_weights, or y in bf16", int8_wrong(order=ints(0, 1, 2, 3))),
    ("no offsets, expected them for more than", int8_wrong(**{**case(4, 16, 256, [0, 2, 4]), "offsets": None})),
    ("tokens=128, expected 16 or 64$", fp8_wrong(128)),
    ("D=3 and x_stride=3, expected multiples of 2", lambda m: m.gather(randn(2, 3).bfloat16())),
]


@pytest.mark.parametrize(("message", "wrong"), BAD)
def test_the_launchers_refuse_with_the_shape(
    emulated: Swapped, message: str, wrong: Callable[[Swapped], object]
) -> None:
    with pytest.raises(RuntimeError, match=message):
        wrong(emulated)
