"""sample_top_p: every backend against float64, its distribution, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import grok_kernels
from tests.kernels import oracle
from tests.kernels.backends import BACKENDS, serving
from tests.kernels.cases import Case, assert_refused, of, randn, refusals
from tests.kernels.oracle import f64

FLOATS = (torch.float32, torch.bfloat16)
LAST = 1 - 2.0**-24  # the largest that uniform takes
INF = float("inf")


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(request.param, "sample_top_p"):
        yield request.param


def sample(logits: Tensor, temperature: Any, top_p: Any, uniform: Any) -> list[int]:
    b = len(logits)
    rows = [torch.as_tensor(x, dtype=torch.float32).expand(b).contiguous() for x in (temperature, top_p, uniform)]
    tokens = grok_kernels.sample_top_p(logits, *rows)
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (b,))
    return tokens.tolist()  # type: ignore[no-any-return]


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("b", "v"), [(0, 7), (1, 1), (300, 3), (300, 50), (20, 1000)])
def test_sample_top_p(b: int, v: int, dtype: torch.dtype, backend: str) -> None:
    b = min(b, 40) if backend == "triton" else b
    logits = randn(b, v, dtype=dtype) * 3
    chance = torch.rand(3, b, generator=torch.Generator().manual_seed(1))
    temperature = torch.where(chance[0] < 0.2, 0.0, chance[0] * 2)
    top_p = torch.where(chance[1] > 0.8, 1.0, chance[1])
    uniform = chance[2]
    rows = zip(f64(logits), temperature.tolist(), top_p.tolist(), uniform.tolist(), strict=True)
    assert sample(logits, temperature, top_p, uniform) == [oracle.sample(*row) for row in rows]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_temperature_zero_takes_the_largest_and_of_equals_the_first(dtype: torch.dtype) -> None:
    rows = [
        [1.0, 3, 3, 2],
        [-1, -2, -1, -1],
        [0, 0, 0, 0],
        [0, 1e-30, 0, 1e-30],
        [-INF, 5, -INF, 5],
        [3e38, 1, 3e38, 0],
    ]
    for uniform in (0.0, 0.5, LAST):
        assert sample(torch.tensor(rows).to(dtype), 0.0, 1.0, uniform) == [1, 0, 0, 1, 1, 0]


def test_ties_are_ordered_by_index() -> None:
    logits = torch.zeros(4, 4)
    assert sample(logits, 1.0, 1.0, [0.0, 0.25, 0.5, 0.75]) == [0, 1, 2, 3]
    assert sample(logits, 1.0, 0.5, [0.0, 0.499, 0.5, LAST]) == [0, 0, 1, 1]
    assert sample(torch.tensor([[0.0, 1.0, 0.0, 1.0]]).expand(4, 4), 0.01, 1.0, [0.0, 0.4, 0.6, LAST]) == [1, 1, 3, 3]


@pytest.mark.parametrize(
    ("top_p", "last"),
    [(1e-30, 2), (0.4, 2), (0.4999, 2), (0.5, 2), (0.51, 0), (0.75, 0), (0.76, 3), (0.9, 1), (1.0, 1)],
)
def test_kept_until_their_sum_reaches_top_p(top_p: float, last: int) -> None:
    """Of 1/2, 1/4, 1/8 and 1/8, in the order 2, 0, 1, 3, the last kept is what the largest uniform draws."""
    exact = torch.tensor([[0.25, 0.125, 0.5, 0.125]]).log2() * np.log(2)
    kept = {sample(exact, 1.0, top_p, u)[0] for u in np.linspace(0, LAST, 17)}
    order = [2, 0, 1, 3]
    expected = 4 if top_p > 0.875 else {2: 1, 0: 2, 1: 3, 3: 3}[last]
    assert kept == set(order[:expected])


@pytest.mark.parametrize("top_p", [0.0, 1e-30, 0.3, 1.0])
def test_the_first_is_always_kept(top_p: float) -> None:
    assert sample(logits_of(0.1, 0.6, 0.3), 1.0, top_p, 0.0) == [1]
    if top_p < 0.6:
        assert sample(logits_of(0.1, 0.6, 0.3), 1.0, top_p, LAST) == [1]


def test_the_ends_of_uniform() -> None:
    logits = logits_of(0.2, 0.5, 0.3)
    assert sample(logits, 1.0, 1.0, 0.0) == [1]
    assert sample(logits, 1.0, 1.0, LAST) == [0]
    assert sample(logits, 1.0, 0.7, LAST) == [2]
    assert sample(logits, 1.0, 0.7, 0.62) == [1]  # 0.62 of the kept 0.8 is 0.496
    assert sample(logits, 1.0, 0.7, 0.63) == [2]


def test_tokens_of_no_probability_are_never_drawn() -> None:
    logits = torch.full((1, 50), -INF)
    logits[0, [7, 30]] = torch.tensor([1.0, 0.5])
    assert {sample(logits, 1.0, 1.0, u)[0] for u in (0.0, 0.3, 0.9, LAST)} == {7, 30}
    one = torch.full((1, 50), -INF)
    one[0, 49] = -1000.0
    assert {sample(one, t, 1.0, u)[0] for t in (0.0, 1.0) for u in (0.0, LAST)} == {49}


@pytest.mark.parametrize("temperature", [1e-38, 1e-3, 1e3, 1e38])
def test_extreme_temperatures(temperature: float) -> None:
    logits = torch.tensor([[1.0, 9.0, 5.0, 3.0]])
    drawn = [sample(logits, temperature, 1.0, u)[0] for u in (0.0, 0.3, 0.6, 0.9)]
    assert drawn == ([1, 1, 1, 1] if temperature < 1 else [1, 2, 3, 0])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_distribution(temperature: float, top_p: float, backend: str) -> None:
    n, logits = 40 if backend == "triton" else 20000, randn(8, seed=3)  # interpreted, a row takes 0.1 s
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(2))
    counts = np.bincount(sample(logits.expand(n, 8), temperature, top_p, uniform), minlength=8)
    p = oracle.softmax(f64(logits) / temperature)
    order = sorted(range(8), key=lambda i: -p[i])
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-9)) + 1]
    expected = np.zeros(8)
    expected[kept] = n * p[kept] / p[kept].sum()
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 24.3  # one in a thousand exceeds it with 7 degrees of freedom, fewer with fewer
    assert len(kept) < 8 or top_p == 1


def test_a_row_does_not_depend_on_the_batch() -> None:
    logits, chance = randn(16, 101), torch.rand(3, 16, generator=torch.Generator().manual_seed(5))
    whole = sample(logits, *chance)
    assert [sample(logits[i : i + 1], *chance[:, i : i + 1])[0] for i in range(16)] == whole
    assert sample(logits.flip(0), *chance.flip(1)) == whole[::-1]


def test_columns_of_a_wider_tensor() -> None:
    wide = torch.full((5, 40), float("nan"))
    wide[:, 3:30] = randn(5, 27)
    chance = torch.rand(3, 5, generator=torch.Generator().manual_seed(6))
    assert sample(wide[:, 3:30], *chance) == sample(wide[:, 3:30].contiguous(), *chance)


@pytest.mark.parametrize(("c", "name", "value", "shown"), refusals("sample_top_p"))
def test_refuses_a_wrong_argument(c: Case, name: str, value: Any, shown: str) -> None:
    assert_refused(c, name, value, shown)


def test_refuses_an_empty_vocabulary() -> None:
    assert_refused(of("sample_top_p")[0], "logits", torch.zeros(3, 0), "V of logits=0", "1 or more")
