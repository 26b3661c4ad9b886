"""What the shared tests of the ops do not show of Triton's products: variants, tile borders, other chips, same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import Weight
from grok_kernels.chips import CHIPS, Chip, assume_chip
from grok_kernels.tuning import Gemm, default_gemm
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS
from tests.kernels.cases import FP8, ints, randint8, randn
from tests.kernels.oracle import assert_near, f64

if "triton" not in BACKENDS:
    pytest.skip("Triton is not installed", allow_module_level=True)

from grok_kernels.triton import gemm as gemm_module

NAN = float("nan")


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    with grok_kernels.use_backend("triton"):
        yield


def few_rows(n: int, k: int, dot: str, weight: torch.dtype, chip: Chip, rows: int, *, pair: bool) -> Gemm:
    return default_gemm(dot, weight, chip, few=True, pair=pair)


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return randint8(*shape, seed=seed) if dtype == torch.int8 else randn(*shape, seed=seed).to(dtype)


def matrices(e: int, n: int, k: int, w: torch.dtype, groups: int = 1, seed: int = 1) -> Weight:
    scales = randn(e, groups, n, seed=seed + 1).abs() * 0.05 + 0.01 if w.itemsize == 1 else None
    return Weight.of(values(e, n, k, dtype=w, seed=seed), scales)


def product(
    m: int, n: int, k: int, x: torch.dtype, w: torch.dtype, offsets: list[int], groups: int = 1
) -> dict[str, Any]:
    e = len(offsets) - 1
    return {
        "x": values(m, k, dtype=x), "weight": matrices(e, n, k, w, groups), "offsets": ints(*offsets),
        "x_scale": randn(m, -(-k // 128), seed=3).abs() + 0.1 if x.itemsize == 1 else None,
    }  # fmt: skip


def exact(c: dict[str, Any]) -> oracle.Array:
    scales, x_scale = (None if x is None else f64(x) for x in (c["weight"].scales, c["x_scale"]))
    w = oracle.dequantize_weight(f64(c["weight"].values), scales)
    return oracle.gemm(oracle.dequantize_rows(f64(c["x"]), x_scale), w, c["offsets"].tolist())


PAIRS = [
    (FP8, FP8, 1),
    (FP8, FP8, 2),
    (torch.bfloat16, FP8, 2),
    (torch.bfloat16, torch.int8, 2),
    (torch.bfloat16, torch.bfloat16, 1),
    (torch.int8, torch.int8, 2),
]


@pytest.mark.parametrize(("x", "w", "groups"), PAIRS, ids=str)
@pytest.mark.parametrize("few", [False, True])
def test_both_variants_across_the_borders_of_tiles(few: bool, x: torch.dtype, w: torch.dtype, groups: int) -> None:
    """Through descriptors (K is a multiple of 256), past a tile's rows and outputs, with experts that have none."""
    c = product(150, 133, 256, x, w, [0, 0, 131, 131, 150], groups)
    c["weight"].values[[0, 2]] = torch.tensor(NAN).to(w) if w != torch.int8 else 127
    with patch.object(gemm_module, "gemm", few_rows if few else gemm_module.gemm):
        got = grok_kernels.grouped_gemm(**c, out_dtype=torch.float32)
    c["weight"].values[[0, 2]] = torch.zeros((), dtype=torch.float32).to(w)
    assert_near(got, exact(c), rel=oracle.product_rel(x, w))


@pytest.mark.parametrize(("x", "w", "groups"), PAIRS, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(x: torch.dtype, w: torch.dtype, groups: int) -> None:
    c = product(140, 40, 256, x, w, [0, 100, 140], groups)
    whole = grok_kernels.grouped_gemm(**c, out_dtype=torch.float32)
    for row in (0, 99, 100, 139):
        own = {n: v if v is None or n.startswith("w") else v[row : row + 1] for n, v in c.items() if n != "offsets"}
        offsets = ints(0, int(row < 100), 1)
        assert torch.equal(
            grok_kernels.grouped_gemm(**own, offsets=offsets, out_dtype=torch.float32), whole[row : row + 1]
        )


@pytest.mark.parametrize("chip", ["a100", "l40s", "mi300x"])
@pytest.mark.parametrize(("x", "w"), [(FP8, FP8), (torch.float32, FP8), (torch.bfloat16, torch.int8)], ids=str)
def test_chips_without_descriptors_or_e4m3(chip: str, x: torch.dtype, w: torch.dtype) -> None:
    c = product(9, 33, 256, x, w, [0, 4, 9])
    with assume_chip(CHIPS[chip]):
        assert_near(grok_kernels.grouped_gemm(**c, out_dtype=torch.float32), exact(c), rel=oracle.product_rel(x, w))


def test_bytes_are_read_as_every_value_of_e4m3() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    with assume_chip(CHIPS["a100"]):
        got = grok_kernels.grouped_gemm(torch.ones(1, 1), Weight.of(codes.view(1, 256, 1), torch.ones(1, 1, 256)))
    assert np.array_equal(f64(got)[0], f64(codes), equal_nan=True)


def test_scales_that_cross() -> None:
    """x in groups of 128, the weights in groups of 100."""
    c = product(5, 20, 300, torch.int8, torch.int8, [0, 2, 5], 3)
    assert_near(grok_kernels.grouped_gemm(**c, out_dtype=torch.float32), exact(c), rel=2e-6)


def layer(t: int, d: int, f: int, w: torch.dtype) -> dict[str, Any]:
    return {
        "x": randn(t, d).bfloat16(), "topk_weights": randn(t, 2, seed=7).abs(),
        "experts": torch.stack((torch.arange(t) % 4, (torch.arange(t) * 3 + 1) % 4), 1).int(),
        "w13": matrices(4, 2 * f, d, w, seed=1), "w2": matrices(4, d, f, w, seed=2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("w", "act_format", "chip"),
    [(FP8, "fp8", "h100"), (FP8, "fp8", "a100"), (torch.int8, "int8", "h100"), (torch.int8, "none", "h100")],
    ids=str,
)
def test_the_layer_as_the_reference_and_with_the_same_bits_alone(w: torch.dtype, act_format: str, chip: str) -> None:
    c = layer(30, 256, 200, w)
    with assume_chip(CHIPS[chip]):
        got = grok_kernels.moe(**c, act_format=act_format)
        own = {n: v if n.startswith("w") else v[7:8] for n, v in c.items()}
        alone = grok_kernels.moe(**own, act_format=act_format)
    with grok_kernels.use_backend("reference"):
        expected = grok_kernels.moe(**c, act_format=act_format)
    assert torch.equal(alone, got[7:8])
    error = np.linalg.norm(f64(got) - f64(expected)) / np.linalg.norm(f64(expected))
    assert error < 2e-3  # a sum next to a rounding step may go either way


def test_a_nan_reaches_its_own_token_alone() -> None:
    c = layer(6, 128, 128, FP8)
    c["x"][2, 5] = NAN
    for act_format in ("none", "fp8", "int8"):
        got = grok_kernels.moe(**c, act_format=act_format)
        assert got.isnan().any(1).tolist() == [row == 2 for row in range(6)]
