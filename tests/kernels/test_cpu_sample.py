"""sample_top_p of the native CPU backend: the reference's tokens, over whole vocabularies and from any instruction set.

The numbers are fixed, and none of the running sums lies within rounding of what it is compared with.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grok_kernels
from grok_kernels import cpu
from tests.kernels.backends import ISAS
from tests.kernels.cases import randn

STATUS = grok_kernels.backends()["sample_top_p"]["cpu"]
pytestmark = pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)
NAN, INF = float("nan"), float("inf")
LAST = 1 - 2.0**-24


def sample(backend: str, logits: Tensor, temperature: Any, top_p: Any, uniform: Any) -> list[int]:
    b = len(logits)
    rows = [torch.as_tensor(x, dtype=torch.float32).expand(b).contiguous() for x in (temperature, top_p, uniform)]
    with grok_kernels.use_backend(backend):
        return grok_kernels.sample_top_p(logits, *rows).tolist()  # type: ignore[no-any-return]


def chances(b: int) -> tuple[Tensor, Tensor, Tensor]:
    """Temperatures, some of 0; top_p, some of 1 and some tiny; uniform."""
    t, p, u = torch.rand(3, b, generator=torch.Generator().manual_seed(1))
    return torch.where(t < 0.1, 0.0, t * 2), torch.where(p > 0.7, 1.0, torch.where(p < 0.2, 1e-4 * p, p)), u


def masked(logits: Tensor, share: float) -> Tensor:
    return logits.masked_fill(torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < share, -INF)


KINDS = {
    "random": lambda b, v: randn(b, v) * 3,
    "bf16": lambda b, v: randn(b, v, dtype=torch.bfloat16) * 3,
    "shifted": lambda b, v: randn(b, v) * 2 + 20,
    "far below 0": lambda b, v: randn(b, v) * 5 - 1000,
    "flat": lambda b, v: randn(b, v) * 1e-3,
    "sharp": lambda b, v: randn(b, v) * 40,
    "ties": lambda b, v: randn(b, v).round(),
    "both zeros": lambda b, v: torch.where(randn(b, v) > 0, 0.0, -0.0),
    "huge": lambda b, v: randn(b, v) * 1e37,
    "nearly all masked": lambda b, v: masked(randn(b, v), 0.999),
    "subnormal": lambda b, v: randn(b, v) * 1e-41,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("b", "v"), [(60, 5), (40, 64), (40, 257), (24, 4000), (6, 32000)])
def test_the_reference_s_tokens_from_every_instruction_set(b: int, v: int, kind: str) -> None:
    logits, chance = KINDS[kind](b, v), chances(b)
    expected = sample("reference", logits, *chance)
    for isa in ISAS:
        with cpu.use_isa(isa):
            assert sample("cpu", logits, *chance) == expected


@pytest.mark.parametrize("kind", ["random", "bf16", "shifted", "nearly all masked"])
def test_a_whole_vocabulary(kind: str) -> None:
    logits = KINDS[kind](4, 131072)
    for top_p, uniform in ((1.0, [0.0, 0.5, 0.999, LAST]), ([0.1, 0.5, 0.9, 0.99], [LAST, 0.7, 0.999, 0.2])):
        assert sample("cpu", logits, 1.0, top_p, uniform) == sample("reference", logits, 1.0, top_p, uniform)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
def test_rows_without_a_distribution(temperature: float, isa: str) -> None:
    logits = randn(8, 40)
    logits[0, 30], logits[1, [7, 9]], logits[2, 5], logits[3, [4, 6]] = NAN, NAN, -NAN, INF
    logits[4], logits[5], logits[6, [3, 8]], logits[7, 39] = -INF, NAN, torch.tensor([INF, NAN]), -INF
    expected = [30, 7, 5, 4, 0, 0, 8]
    with cpu.use_isa(isa):
        got = sample("cpu", logits, temperature, 0.9, 0.6)
    assert got[:7] == expected
    assert got == sample("reference", logits, temperature, 0.9, 0.6)


@pytest.mark.parametrize("isa", ISAS)
def test_equal_logits_are_drawn_by_index(isa: str) -> None:
    v = 32768  # so that every probability and sum is exact
    uniform = torch.tensor([0.0, 1 / v, 2 / v, 0.25, 0.5 - 2.0**-25, 0.5, 0.75, LAST])
    with cpu.use_isa(isa):
        for top_p in (1.0, 0.5, 2.0**-13):
            got = sample("cpu", torch.full((8, v), -3.25), 0.7, top_p, uniform)
            assert got == (uniform.double() * v * top_p).long().tolist()


def test_does_not_depend_on_the_batch_or_the_threads() -> None:
    logits, chance = randn(30, 5000) * 3, chances(30)
    expected = sample("cpu", logits, *chance)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert sample("cpu", logits, *chance) == expected
    finally:
        torch.set_num_threads(before)
    assert [sample("cpu", logits[i : i + 1], *(c[i : i + 1] for c in chance))[0] for i in range(30)] == expected


def test_a_small_row_after_a_large_one_reads_nothing_of_it() -> None:
    small, chance = randn(3, 9), chances(3)
    expected = sample("cpu", small, *chance)
    sample("cpu", torch.full((1, 70000), 50.0), 1.0, 1.0, 0.5)
    assert sample("cpu", small, *chance) == expected == sample("reference", small, *chance)


def test_arguments_out_of_range_still_give_a_token_that_is_kept() -> None:
    logits = torch.tensor([[1.0, 5.0, 3.0]])
    assert [sample("cpu", logits, 1.0, 0.9, u)[0] for u in (1.0, 2.0, -1.0, NAN)] == [2, 2, 1, 1]
    assert [sample("cpu", logits, 1.0, p, LAST)[0] for p in (-1.0, 0.0, NAN, 2.0)] == [1, 1, 1, 0]
    assert [sample("cpu", logits, t, 0.9, 0.0)[0] for t in (-1.0, NAN, INF)] == [1, 1, 1]


def test_the_native_op_checks_what_memory_safety_needs() -> None:
    from grok_kernels import _C

    op, logits, row = _C.sample_top_p, randn(3, 8), torch.ones(3)
    for name, args in {"temperature": (row[:2], row, row), "top_p": (row, row[:1], row)}.items():
        with pytest.raises(ValueError, match=rf"{name} has shape \[\d\], expected \(B,\) with B=3 from logits"):
            op(logits, *args)
    with pytest.raises(ValueError, match="uniform has dtype Double, expected Float"):
        op(logits, row, row, row.double())
    with pytest.raises(ValueError, match=r"V of logits=0, expected 1\.\.2147483647"):
        op(logits[:, :0], row, row, row)
